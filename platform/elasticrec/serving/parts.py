"""A batch of answers as files, each of neighbouring users: what is asked in, the parts that are missing out.

A part gets its name when it is whole. So a batch that was killed goes on with what is missing, and ends with the files
that it would have had.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from elasticrec.data.sequences import Replaceable, refuse_foreign
from elasticrec.errors import ConfigError
from elasticrec.serving.batch import BATCH_SCHEMA

ASKED = "_batch.json"  # readers of parquet folders pass over names that begin with _


def _holds_answers(folder: Path) -> bool:
    """Whether nothing but parquet files of earlier answers is in a folder; a log in parquet must not be replaced."""
    try:
        files = [file for file in folder.iterdir() if file.name != ASKED]
        return all(pq.read_schema(file).names == BATCH_SCHEMA.names for file in files)
    except (OSError, pa.ArrowException):
        return False


ANSWERS = Replaceable("folder of recommendations", _holds_answers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """All that the answers depend on."""

    bundle: str  # a hash of its manifest, and so of its files
    store: str  # its fingerprint
    users: int
    k: int
    batch_users: int  # users that go through the model together: sums of other batches round otherwise
    part_users: int

    @property
    def parts(self) -> range:
        """Numbers of all parts."""
        return range(-(-self.users // self.part_users))

    def users_of(self, part: int) -> range:
        """Indices of the users of a part."""
        return range(part * self.part_users, min(self.users, (part + 1) * self.part_users))

    def missing(self, folder: Path) -> list[int]:
        """Parts that are not in the folder yet."""
        return [part for part in self.parts if not part_file(folder, part).exists()]


def part_file(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{part:06}.parquet"


def write_part(file: Path, tables: Iterator[pa.Table]) -> int:
    """Writes the tables of a part one after the other, and then gives the file its name. Returns the rows."""
    partial, rows = file.with_name(f".{file.name}.{os.getpid()}"), 0
    with partial.open("wb") as sink:
        with pq.ParquetWriter(sink, BATCH_SCHEMA) as writer:
            for table in tables:
                writer.write_table(table)
                rows += table.num_rows
        sink.flush()
        os.fsync(sink.fileno())
    partial.rename(file)
    return rows


@contextlib.contextmanager
def growing_folder(final: Path, asked: Asked) -> Iterator[Path]:
    """Yields a folder that takes the name `final` when the block ends well.

    When it does not, finished parts stay for the next time that the same is asked; parts of anything else go.

    Raises:
        ConfigError: what stands at `final` is not ours to replace, or another process fills the folder.
    """
    final = Path(os.path.realpath(final))
    refuse_foreign(final, ANSWERS)
    growing = final.with_name(f".{final.name}.parts")
    growing.mkdir(parents=True, exist_ok=True)
    with _alone(growing, final):
        _keep_parts_of(growing, asdict(asked))
        yield growing
        refuse_foreign(final, ANSWERS)  # again: the block may have taken hours
        _take_place(growing, final)


@contextlib.contextmanager
def _alone(growing: Path, final: Path) -> Iterator[None]:
    folder = os.open(growing, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when this process ends
        yield
    except BlockingIOError:
        raise ConfigError(f"another process is writing '{final}'; wait for it, or name another folder") from None
    finally:
        os.close(folder)


def _keep_parts_of(growing: Path, asked: Mapping[str, object]) -> None:
    file = growing / ASKED
    try:
        same = json.loads(file.read_text(encoding="utf-8")) == asked
    except (OSError, ValueError):
        same = False
    for path in growing.iterdir():
        if not same or path.name.startswith(".part-"):  # the latter: of a writer that was killed
            path.unlink()
    file.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")


def _take_place(growing: Path, final: Path) -> None:
    if not final.exists():
        growing.rename(final)
        return
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    final.rename(old)
    growing.rename(final)
    shutil.rmtree(old)
