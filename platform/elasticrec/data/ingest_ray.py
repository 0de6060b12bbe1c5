"""Input files and a Ray cluster in; the same encoded sequences as `ingest` gives out.

Ray Data reads and checks files (row groups of parquet files) in parallel and hands the blocks over in the order of the
input; this process encodes them into files as they come and sorts those, as `ingest` does. It holds the id maps and a
few blocks, never the events.

# N distinct raw ids
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from elasticrec.columns import EVENT
from elasticrec.data import schema, tables
from elasticrec.data.cluster import connect
from elasticrec.data.files import InputFile
from elasticrec.data.ingest import Core, Encoder, Ingested, require_events
from elasticrec.data.schema import Checked, ColumnMap
from elasticrec.errors import InputError

_PART_ROWS = 1 << 20  # small row groups are read together


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    file: InputFile
    row_groups: tuple[int, ...] | None


def ingest_ray(
    files: Sequence[InputFile], columns: ColumnMap, core: Core, scratch: Path, *, address: str | None = None
) -> Ingested:
    """Reads and checks on a cluster; filters, encodes and sorts here.

    Args:
        scratch: folder on this machine for the arrays; needed until the store is written.
        address: of the cluster, where Ray is not yet initialised.

    Raises:
        ConfigError: no cluster answers at the address.
        InputError: something is wrong with the input.
    """
    if not ray.is_initialized():
        connect(address, log_to_driver=False)
    encoder = Encoder(scratch)
    findings: Any = ray.remote(num_cpus=0)(Findings).remote()
    with contextlib.closing(encoder), _ordered():
        for events in _read(_parts(files), columns, findings):
            encoder.add(events)
    unit = _agreed(ray.get(findings.all.remote()))
    require_events(encoder.rows, files)
    return encoder.finish(core, unit)


def _parts(files: Sequence[InputFile]) -> list[_Part]:
    parts = []
    for file in files:
        pieces = tables.row_group_pieces(file, _PART_ROWS)
        parts += [_Part(file=file, row_groups=piece) for piece in pieces] or [_Part(file=file, row_groups=None)]
    return parts


class Findings:
    """An actor: what the readers of all parts found, by part and block."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Checked | str] = {}

    def add(self, part: int, block: int, found: Checked | str) -> None:
        """Keeps the facts of a block, or the message of what is wrong with it."""
        self._found[part, block] = found

    def all(self) -> list[Checked | str]:
        """In the order of the input."""
        return [self._found[place] for place in sorted(self._found)]


def _read(parts: list[_Part], columns: ColumnMap, findings: Any) -> Iterator[pa.Table]:
    """The events of all parts, read on the cluster, in the order of the input."""
    shared = ray.put((parts, columns))
    numbers: Any = ray.data.range(len(parts), override_num_blocks=len(parts))
    arguments = {"shared": shared, "findings": findings}
    events = numbers.map_batches(_read_parts, batch_format="pyarrow", fn_kwargs=arguments)
    yield from events.iter_batches(batch_size=None, batch_format="pyarrow")  # block by block, as they were read


def _read_parts(numbers: pa.Table, shared: Any, findings: Any) -> Iterator[pa.Table]:
    parts, columns = ray.get(shared)
    for number in numbers["id"].to_pylist():
        part: _Part = parts[number]
        blocks = schema.read_event_blocks(part.file, columns, part.row_groups)
        try:
            for place, checked in enumerate(blocks):
                facts = dataclasses.replace(checked, events=checked.events.slice(0, 1))
                ray.get(findings.add.remote(number, place, facts))
                yield _plain(checked.events)
        except InputError as error:  # told, not raised: Ray would print the traces of every worker
            ray.get(findings.add.remote(number, _LAST, str(error)))


_LAST = 1 << 62  # after all blocks of a part


def _plain(events: pa.Table) -> pa.Table:
    """Without dictionaries, which differ from block to block."""
    if EVENT not in events.column_names:
        return events
    return events.set_column(events.column_names.index(EVENT), EVENT, pc.cast(events[EVENT], pa.string()))


def _agreed(findings: list[Checked | str]) -> str | None:
    checked = []
    for found in findings:
        if isinstance(found, str):
            raise InputError(found)
        checked.append(found)
    schema.check_agreement(checked)
    return next((part.time_unit for part in checked if part.events.num_rows), None)


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
