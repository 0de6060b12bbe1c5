"""Checked events of one process in; encoded sequences, sorted by user and time, out.

What a cluster does in `ingest_ray` gives the same arrays bit for bit: both order by (user, time, place in the input),
and take ids from counts and first places.

# U users, I items, E events, N distinct raw ids
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.columns import EVENT, ITEM, RATING, TIME, USER
from elasticrec.data import ids, schema
from elasticrec.data.files import InputFile
from elasticrec.data.progress import track
from elasticrec.data.schema import ColumnMap
from elasticrec.data.sequences import Int64, Sequences
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


def ingest(files: Sequence[InputFile], columns: ColumnMap, core: Core) -> Ingested:
    """Reads, checks, filters, encodes and sorts in this process.

    Raises:
        InputError: the first thing that is wrong with the input.
    """
    parts = [schema.read_events(file, columns) for file in track(files, "reading")]
    schema.check_agreement(parts)
    events = pa.concat_tables([part.events for part in parts])
    unit = next((part.time_unit for part in parts if part.events.num_rows), None)
    del parts
    require_events(events.num_rows, files)
    user_E, user_N = _codes(events[USER])
    item_E, item_N = _codes(events[ITEM])
    keep_E = core_filter(user_E, item_E, core)
    if keep_E is not None:
        events, user_E, item_E = events.filter(pa.array(keep_E)), user_E[keep_E], item_E[keep_E]
    return _encoded(events, (user_E, user_N), (item_E, item_N), rows=len(keep_E) if keep_E is not None else len(user_E),
                    unit=unit)  # fmt: skip


def _encoded(
    events: pa.Table, users: tuple[npt.NDArray[Any], pa.Array], items: tuple[npt.NDArray[Any], pa.Array], *, rows: int,
    unit: str | None,
) -> Ingested:  # fmt: skip
    (user_E, user_N), (item_E, item_N) = users, items
    user_count_N, item_count_N = ids.counts(user_E, len(user_N)), ids.counts(item_E, len(item_N))
    user_order_U = ids.users_by_appearance(user_count_N, ids.first_positions(user_E, len(user_N)))
    item_order_I = ids.items_by_popularity(item_count_N, ids.first_positions(item_E, len(item_N)))
    index_E = ids.index_of(user_order_U, len(user_N), 0)[user_E]
    time_E = events[TIME].to_numpy() if TIME in events.column_names else None
    order_E = np.argsort(index_E, kind="stable") if time_E is None else np.lexsort((time_E, index_E))
    names, event_E = _event_codes(events)
    return Ingested(
        sequences=Sequences(
            item_E=ids.index_of(item_order_I, len(item_N), 1)[item_E[order_E]],
            offset_U1=offsets(user_count_N[user_order_U]),
            time_E=None if time_E is None else time_E[order_E],
            rating_E=events[RATING].to_numpy()[order_E] if RATING in events.column_names else None,
            event_E=None if event_E is None else event_E[order_E],
        ),
        user_ids=user_N.take(pa.array(user_order_U)),
        item_ids=item_N.take(pa.array(item_order_I)),
        count_I=item_count_N[item_order_I],
        event_types=names,
        rows=rows,
        time_unit=unit,
    )


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


def _codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], pa.Array]:
    """Codes by first appearance, and the distinct values in that order."""
    chunks = column.dictionary_encode().unify_dictionaries().chunks
    if len(chunks) == 0:
        return np.zeros(0, dtype=np.int32), pa.array([], pa.string())
    code_E = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks])
    return code_E, chunks[-1].dictionary


def _event_codes(events: pa.Table) -> tuple[list[str], npt.NDArray[np.int16] | None]:
    if EVENT not in events.column_names:
        return [], None
    names = event_names(pc.unique(events[EVENT]).to_pylist())
    codes = pc.index_in(events[EVENT], pa.array(names, pa.string()))
    return names, codes.to_numpy().astype(np.int16)
