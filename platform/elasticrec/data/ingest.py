"""Checked events, block by block, in; encoded sequences, sorted by user and time, out.

One process reads the blocks here, a cluster does in `ingest_ray`; from there on both are the same.

# U users, I items, E events, N distinct raw ids
"""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from elasticrec.columns import EVENT, ITEM, RATING, TIME, USER
from elasticrec.data import ids, schema
from elasticrec.data.codes import Codes
from elasticrec.data.files import InputFile
from elasticrec.data.progress import track
from elasticrec.data.schema import Checked, ColumnMap
from elasticrec.data.sequences import Int16, Int64, Sequences
from elasticrec.data.spool import Column, Layout, Spool, arrange
from elasticrec.errors import InputError

MAX_EVENT_TYPES = np.iinfo(np.int16).max


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """k-core: users and items with fewer events are dropped, again and again until none is left to drop."""

    min_user_events: int = 0
    min_item_events: int = 0

    @property
    def active(self) -> bool:
        return self.min_user_events > 1 or self.min_item_events > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """Everything of a store but the item descriptions."""

    sequences: Sequences
    user_ids: pa.Array  # U
    item_ids: pa.Array  # I, most popular first
    count_I: Int64
    event_types: list[str]
    rows: int  # events read, before the k-core filter
    time_unit: str | None


class Encoder:
    """Checked events, block by block in the order of the input, in; the encoded sequences out.

    The memory it needs follows from the number of distinct ids; the events go through files.
    """

    def __init__(self, scratch: Path) -> None:
        """`scratch`: a folder for columns on disk, which the result maps."""
        self._scratch = scratch
        self._spool = Spool(scratch)
        self._codes = {USER: Codes(), ITEM: Codes(), EVENT: Codes()}

    @property
    def rows(self) -> int:
        """Events so far."""
        return self._spool.rows

    def add(self, events: pa.Table) -> None:
        """Encodes a block.

        Raises:
            InputError: it names too many event types.
        """
        if events.num_rows == 0:
            return
        block: dict[str, Column] = {name: self._codes[name].add(_whole(events[name])) for name in (USER, ITEM)}
        block |= {name: _whole(events[name]).to_numpy() for name in (TIME, RATING) if name in events.column_names}
        if EVENT in events.column_names:
            code_E = self._codes[EVENT].add(_whole(events[EVENT]))
            event_names(self._codes[EVENT].values().to_pylist())
            block[EVENT] = code_E.astype(np.int16)
        self._spool.append(block)

    def close(self) -> None:
        """Ends the adding, also after an error."""
        self._spool.close()

    def finish(self, core: Core, time_unit: str | None) -> Ingested:
        """Filters, gives ids and sorts.

        Raises:
            InputError: the filter leaves no event.
        """
        self.close()
        rows = self._spool.rows
        keep_E = core_filter(self._spool.column(USER), self._spool.column(ITEM), core)
        user_N, item_N = self._codes[USER].values(), self._codes[ITEM].values()
        user, item = self._tally(USER, len(user_N), keep_E), self._tally(ITEM, len(item_N), keep_E)
        order_U = ids.users_by_appearance(user.count_N, user.first_N)
        order_I = ids.items_by_popularity(item.count_N, item.first_N)
        index_of: dict[str, Column] = {
            USER: ids.index_of(order_U, len(user_N), 0),
            ITEM: ids.index_of(order_I, len(item_N), 1),
        }
        names, index_of[EVENT] = self._event_types(keep_E)
        layout = Layout(offset_U1=offsets(user.count_N[order_U]), index_of=index_of, keep_E=keep_E)
        columns = arrange(self._spool, layout, self._scratch)
        return Ingested(
            sequences=Sequences(
                item_E=columns[ITEM],
                offset_U1=layout.offset_U1,
                time_E=columns.get(TIME),
                rating_E=columns.get(RATING),
                event_E=columns.get(EVENT),
            ),
            user_ids=user_N.take(pa.array(order_U)),
            item_ids=item_N.take(pa.array(order_I)),
            count_I=item.count_N[order_I],
            event_types=names,
            rows=rows,
            time_unit=time_unit,
        )

    def _tally(self, name: str, distinct: int, keep_E: npt.NDArray[np.bool_] | None) -> ids.Tally:
        tally = ids.Tally(distinct)
        for rows in self._spool.blocks():
            code_E = self._spool.read(name, rows)
            tally.add(code_E if keep_E is None else code_E[keep_E[rows]])
        return tally

    def _event_types(self, keep_E: npt.NDArray[np.bool_] | None) -> tuple[list[str], Int16]:
        """Names of the types that kept events have, in the order of their codes; the place of each code first seen."""
        found = self._codes[EVENT].values().to_pylist()
        if not found:
            return [], np.zeros(0, dtype=np.int16)
        count_N = self._tally(EVENT, len(found), keep_E).count_N
        names = event_names([name for name, count in zip(found, count_N, strict=True) if count])
        place_of = {name: place for place, name in enumerate(names)}
        return names, np.array([place_of.get(name, ids.ABSENT) for name in found], dtype=np.int16)


def ingest(files: Sequence[InputFile], columns: ColumnMap, core: Core, scratch: Path) -> Ingested:
    """Reads, checks, filters, encodes and sorts in this process.

    Args:
        scratch: folder for the arrays; needed until the store is written.

    Raises:
        InputError: the first thing that is wrong with the input.
    """
    encoder, first = Encoder(scratch), None
    blocks = (part for file in track(files, "reading") for part in schema.read_event_blocks(file, columns))
    with contextlib.closing(encoder), contextlib.closing(_ahead(blocks)) as ahead:
        for part in ahead:
            if part.events.num_rows:
                first = first or dataclasses.replace(part, events=part.events.slice(0, 1))
                schema.check_agreement([first, part])
                encoder.add(part.events)
    require_events(encoder.rows, files)
    return encoder.finish(core, first.time_unit if first else None)


def _ahead(blocks: Generator[Checked, None, None]) -> Generator[Checked, None, None]:
    """The blocks, each read by another thread while the one before is in work."""
    with contextlib.closing(blocks), ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, blocks, None)
        while (block := waiting.result()) is not None:
            waiting = reader.submit(next, blocks, None)
            yield block


def require_events(rows: int, files: Sequence[InputFile]) -> None:
    """Raises InputError when all files together hold no row."""
    if rows == 0:
        shown = "', '".join(file.shown for file in files[:3]) + ("' and others" if len(files) > 3 else "'")
        raise InputError(f"'{shown} hold no rows below the header; bring a log with events")


def core_filter(user_E: npt.NDArray[Any], item_E: npt.NDArray[Any], core: Core) -> npt.NDArray[np.bool_] | None:
    """Which events stay: (E,), or None when nothing is asked for. The fixed point is reached whatever the order.

    Raises:
        InputError: nothing stays.
    """
    if not core.active:
        return None
    keep_E = np.ones(len(user_E), dtype=bool)
    while True:
        users_N, items_N = np.bincount(user_E[keep_E]), np.bincount(item_E[keep_E])
        if len(users_N) == 0:
            raise nothing_left(core)
        stay_U, stay_I = users_N >= core.min_user_events, items_N >= core.min_item_events
        after_E = keep_E.copy()
        after_E[keep_E] = stay_U[user_E[keep_E]] & stay_I[item_E[keep_E]]
        if after_E.sum() == keep_E.sum():
            return keep_E
        keep_E = after_E


def nothing_left(core: Core) -> InputError:
    return InputError(
        f"no event is left after dropping users with fewer than {core.min_user_events} and items with fewer than "
        f"{core.min_item_events} events; lower min_user_events or min_item_events"
    )


def offsets(length_U: Int64) -> Int64:
    """Where each user's events begin, and the end of the last: (U + 1,)."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(length_U, dtype=np.int64)])


def event_names(found: Sequence[str]) -> list[str]:
    """Distinct names in the order of their codes.

    Raises:
        InputError: there are more than the store can hold, which no event type ever has.
    """
    names = sorted(set(found))
    if len(names) > MAX_EVENT_TYPES:
        raise InputError(
            f"the event column holds {len(names)} different types; it must name kinds of events, not events"
        )
    return names


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
