"""Input files and a Ray cluster in; the same encoded sequences as `ingest` gives, made with Ray Data, out.

Files (row groups of parquet files) are read and checked in parallel, distinct ids are counted in every block and the
counts added up here, blocks are encoded by the id maps, which every worker gets once, then sorted by (user, time,
place) across the cluster and streamed into arrays on disk. This process holds the id maps, never the events.

# U users, I items, E events, N distinct raw ids
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from elasticrec.columns import EVENT, ITEM, RATING, TIME, USER
from elasticrec.data import ids, schema, tables
from elasticrec.data.files import InputFile
from elasticrec.data.ingest import Core, Ingested, event_names, nothing_left, offsets, require_events
from elasticrec.data.schema import Checked, ColumnMap
from elasticrec.data.sequences import Int64, Sequences
from elasticrec.errors import InputError

PLACE = "place"  # part number above _ROW_BITS, row in the part below: the order of the input
_ROW_BITS = 40
_TALLIED = pa.schema([("column", pa.string()), ("value", pa.string()), ("count", pa.int64()), (PLACE, pa.int64())])
_BATCH_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    file: InputFile
    row_groups: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Distinct:
    """Distinct raw ids with how many events use them and where the first is."""

    values: pa.Array
    count_N: Int64
    first_N: Int64


def ingest_ray(
    files: Sequence[InputFile], columns: ColumnMap, core: Core, scratch: Path, *, address: str | None = None
) -> Ingested:
    """Reads, checks, filters, encodes and sorts on a cluster.

    Args:
        scratch: folder on this machine for the arrays; needed until the store is written.
        address: of the cluster, where Ray is not yet initialised.

    Raises:
        InputError: something is wrong with the input.
    """
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    with _ordered():
        events, unit = _read(_parts(files), columns)
        tally = _merged(list(_batches(events.map_batches(_tally, batch_format="pyarrow"))))
        users, items = _distinct(tally, USER), _distinct(tally, ITEM)
        rows = int(users.count_N.sum())
        require_events(rows, files)
        names = event_names(_values(tally, EVENT).to_pylist())
        maps = ray.put((users.values, items.values, pa.array(names, pa.string())))
        encoded = events.map_batches(_encode, batch_format="pyarrow", fn_kwargs={"maps": maps})
        if core.active:
            encoded, users, items = _core(encoded.materialize(), users, items, core)
        return _sorted(encoded, users, items, scratch, names, rows, unit)


def _parts(files: Sequence[InputFile]) -> list[_Part]:
    parts = []
    for file in files:
        groups = tables.row_group_count(file)
        parts += [_Part(file=file, row_groups=(group,) if groups > 1 else None) for group in range(groups)]
    return parts


class Findings:
    """An actor: what the readers of all parts found, by part number."""

    def __init__(self) -> None:
        self._found: dict[int, Checked | str] = {}

    def add(self, number: int, found: Checked | str) -> None:
        """Keeps the facts of a part, or the message of what is wrong with it."""
        self._found[number] = found

    def all(self) -> list[Checked | str]:
        """In the order of the parts."""
        return [self._found[number] for number in sorted(self._found)]


def _read(parts: list[_Part], columns: ColumnMap) -> tuple[Any, str | None]:
    """The events of all parts on the cluster, and the unit of their times."""
    shared = ray.put((parts, columns))
    findings: Any = ray.remote(num_cpus=0)(Findings).remote()
    numbers: Any = ray.data.range(len(parts), override_num_blocks=len(parts))
    arguments = {"shared": shared, "findings": findings}
    events = numbers.map_batches(_read_parts, batch_format="pyarrow", fn_kwargs=arguments).materialize()
    return events, _agreed(ray.get(findings.all.remote()))


def _read_parts(numbers: pa.Table, shared: Any, findings: Any) -> Iterator[pa.Table]:
    parts, columns = ray.get(shared)
    for number in numbers["id"].to_pylist():
        part: _Part = parts[number]
        try:
            checked = schema.read_events(part.file, columns, part.row_groups)
        except InputError as error:  # told, not raised: Ray would print the traces of every worker
            ray.get(findings.add.remote(number, str(error)))
            continue
        ray.get(findings.add.remote(number, dataclasses.replace(checked, events=checked.events.slice(0, 1))))
        place_E = (number << _ROW_BITS) + np.arange(checked.events.num_rows, dtype=np.int64)
        yield checked.events.append_column(PLACE, pa.array(place_E))


def _agreed(findings: list[Checked | str]) -> str | None:
    checked = []
    for found in findings:
        if isinstance(found, str):
            raise InputError(found)
        checked.append(found)
    schema.check_agreement(checked)
    return next((part.time_unit for part in checked if part.events.num_rows), None)


def _tally(events: pa.Table) -> pa.Table:
    """Distinct values of a block: column, value, count, first place."""
    columns = [name for name in (USER, ITEM, EVENT) if name in events.column_names]
    return pa.concat_tables([_tally_column(events, name) for name in columns])


def _tally_column(events: pa.Table, name: str) -> pa.Table:
    counted = events.group_by(name).aggregate([(PLACE, "count"), (PLACE, "min")])
    return pa.table(
        [
            pa.array([name] * counted.num_rows, pa.string()),
            pc.cast(counted[name], pa.string()),
            counted[f"{PLACE}_count"],
            counted[f"{PLACE}_min"],
        ],
        schema=_TALLIED,
    )


def _merged(blocks: list[pa.Table]) -> pa.Table:
    """One row for each (column, value), in the order of first places."""
    if not blocks:
        return _TALLIED.empty_table()
    added = pa.concat_tables(blocks).group_by(["column", "value"]).aggregate([("count", "sum"), (PLACE, "min")])
    return added.rename_columns(_TALLIED.names).sort_by(PLACE)


def _values(tally: pa.Table, name: str) -> pa.ChunkedArray:
    return tally.filter(pc.equal(tally["column"], name))["value"]


def _distinct(tally: pa.Table, name: str) -> _Distinct:
    own = tally.filter(pc.equal(tally["column"], name))
    values = own["value"].combine_chunks()
    return _Distinct(values=values, count_N=own["count"].to_numpy(), first_N=own[PLACE].to_numpy())


def _encode(events: pa.Table, maps: Any) -> pa.Table:
    users, items, names = ray.get(maps)
    encoded = {USER: pc.index_in(events[USER], users), ITEM: pc.index_in(events[ITEM], items)}
    encoded |= {name: events[name] for name in (TIME, RATING) if name in events.column_names}
    if EVENT in events.column_names:
        encoded[EVENT] = pc.cast(pc.index_in(events[EVENT], names), pa.int16())
    return pa.table(encoded | {PLACE: events[PLACE]})


def _core(encoded: Any, users: _Distinct, items: _Distinct, core: Core) -> tuple[Any, _Distinct, _Distinct]:
    """Drops until nothing is left to drop; each round counts on the cluster and decides here."""
    kept = encoded
    while True:
        stay_U, stay_I = users.count_N >= core.min_user_events, items.count_N >= core.min_item_events
        stay_U &= users.count_N > 0
        stay_I &= items.count_N > 0
        if not stay_U.any() or not stay_I.any():
            raise nothing_left(core)
        before = int(users.count_N.sum())
        stay = ray.put((stay_U, stay_I))
        kept = encoded.map_batches(_stay, batch_format="pyarrow", fn_kwargs={"stay": stay})
        tally = _merged(list(_batches(kept.map_batches(_tally_codes, batch_format="pyarrow"))))
        users, items = _recounted(tally, USER, users), _recounted(tally, ITEM, items)
        if int(users.count_N.sum()) == before:
            return kept, users, items


def _stay(events: pa.Table, stay: Any) -> pa.Table:
    stay_U, stay_I = ray.get(stay)
    return events.filter(pa.array(stay_U[events[USER].to_numpy()] & stay_I[events[ITEM].to_numpy()]))


def _tally_codes(events: pa.Table) -> pa.Table:
    return pa.concat_tables([_tally_column(events, name) for name in (USER, ITEM)])


def _recounted(tally: pa.Table, name: str, old: _Distinct) -> _Distinct:
    own = tally.filter(pc.equal(tally["column"], name))
    code = pc.cast(own["value"], pa.int64()).to_numpy()
    count_N, first_N = np.zeros_like(old.count_N), old.first_N.copy()
    count_N[code], first_N[code] = own["count"].to_numpy(), own[PLACE].to_numpy()
    return _Distinct(values=old.values, count_N=count_N, first_N=first_N)


def _sorted(
    encoded: Any, users: _Distinct, items: _Distinct, scratch: Path, names: list[str], rows: int, unit: str | None
) -> Ingested:
    order_U = ids.users_by_appearance(users.count_N, users.first_N)
    order_I = ids.items_by_popularity(items.count_N, items.first_N)
    indices = ray.put((ids.index_of(order_U, len(users.values), 0), ids.index_of(order_I, len(items.values), 1)))
    indexed = encoded.map_batches(_index, batch_format="pyarrow", fn_kwargs={"indices": indices})
    first = next(iter(indexed.iter_batches(batch_size=1, batch_format="pyarrow")))
    keys = [name for name in (USER, TIME, PLACE) if name in first.column_names]
    arrays = _written(indexed.sort(keys), int(users.count_N.sum()), first, scratch)
    return Ingested(
        sequences=Sequences(
            item_E=arrays[ITEM],
            offset_U1=offsets(users.count_N[order_U]),
            time_E=arrays.get(TIME),
            rating_E=arrays.get(RATING),
            event_E=arrays.get(EVENT),
        ),
        user_ids=users.values.take(pa.array(order_U)),
        item_ids=items.values.take(pa.array(order_I)),
        count_I=items.count_N[order_I],
        event_types=names,
        rows=rows,
        time_unit=unit,
    )


def _index(events: pa.Table, indices: Any) -> pa.Table:
    user_N, item_N = ray.get(indices)
    encoded = {USER: user_N[events[USER].to_numpy()], ITEM: item_N[events[ITEM].to_numpy()]}
    encoded |= {name: events[name].to_numpy() for name in (TIME, RATING, EVENT, PLACE) if name in events.column_names}
    return pa.table(encoded)


def _written(events: Any, rows: int, like: pa.Table, scratch: Path) -> dict[str, npt.NDArray[Any]]:
    """Streams sorted blocks into arrays on disk."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in like.column_names:
        if name not in (USER, PLACE):
            kind = like[name].to_numpy().dtype
            arrays[name] = np.memmap(scratch / f"{name}.raw", dtype=kind, mode="w+", shape=(rows,))
    begin = 0
    for batch in _batches(events):
        for name, array in arrays.items():
            array[begin : begin + batch.num_rows] = batch[name].to_numpy()
        begin += batch.num_rows
    assert begin == rows, f"{begin} events came back from the sort of {rows}"
    return arrays


def _batches(dataset: Any) -> Iterator[pa.Table]:
    yield from dataset.iter_batches(batch_size=_BATCH_ROWS, batch_format="pyarrow")


@contextlib.contextmanager
def _ordered() -> Iterator[None]:
    """Blocks come back in order."""
    context = ray.data.DataContext.get_current()
    before = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        yield
    finally:
        context.execution_options.preserve_order = before
