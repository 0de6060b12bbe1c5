"""What a sweep's folder keeps, so that the same command goes on: what was asked, the teacher, a row a finished trial.

OUT/sweep.json          what rows depend on; another sweep is refused
OUT/teacher.json, .npz  the teacher's metrics, and its rank for every case
OUT/<trial>/            the bundle of a trial
OUT/<trial>.json        its row, written last
OUT/.<trial>.lock       held while it is made
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any, Final, cast

import numpy as np

from elasticrec.artifact.bundle import verify_bundle
from elasticrec.artifact.claim import ClaimedError, claimed
from elasticrec.artifact.location import Location, locate
from elasticrec.compression.recipe import Recipe, label
from elasticrec.errors import BundleError, ConfigError
from elasticrec.evaluation.metrics import Int64

SWEEP: Final = "sweep.json"
TEACHER, TEACHER_RANKS = "teacher.json", "teacher.npz"
_LONGEST_NAME = 100  # characters; file systems end at 255 bytes
_ASK_AGAIN_S: Final = 0.2
_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

Row = dict[str, Any]
Ranks = dict[str, Int64]  # test and validation


def folder_name(recipe: Recipe) -> str:
    """The label as a file name; long ones end in a digest."""
    name = re.sub(r"[^\w.+=-]", "_", label(recipe))
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(label(recipe).encode()).hexdigest()[:8]}"


def claim(out: Location, asked: Row) -> None:
    """Makes the folder, or goes on in one that was asked the same.

    Raises:
        ConfigError: it holds something else, or the sweep of another teacher, data set or way to measure.
    """
    place = out / SWEEP
    if not place.exists():
        if found := [name for name in out.children() if not name.startswith(f"{SWEEP}.partial-")]:
            raise ConfigError(f"'{out}' holds '{found[0]}' already; give a sweep a folder of its own")
        out.make_folder()
        write_json(place, asked)
        return
    before = json.loads(place.read())
    for key, value in json.loads(json.dumps(asked)).items():
        if before.get(key) != value:
            raise ConfigError(
                f"'{out}' holds a sweep with another '{key}' ({before.get(key)}, now {value}); give this one a folder "
                "of its own, or ask the same to go on"
            )


@contextlib.contextmanager
def alone(out: Location, recipe: Recipe) -> Iterator[None]:
    """Waits until no other trial makes the bundle of the recipe, then keeps others waiting.

    Where nothing can be locked (object stores, some network mounts), it waits for nobody.
    """
    with contextlib.ExitStack() as held:
        while not _entered(held, out, recipe):
            time.sleep(_ASK_AGAIN_S)
        yield


def _entered(held: contextlib.ExitStack, out: Location, recipe: Recipe) -> bool:
    try:
        held.enter_context(claimed(out / f".{folder_name(recipe)}.lock", label(recipe)))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    except ClaimedError:
        return False
    return True


def finished_row(out: Location, recipe: Recipe) -> Row | None:
    """The row of a trial that is done and whose bundle is whole."""
    name = folder_name(recipe)
    try:
        row = cast(Row, json.loads((out / f"{name}.json").read()))
        verify_bundle(out / name)
    except (OSError, ValueError, BundleError):
        return None
    return row


def forget(out: Location, recipe: Recipe) -> None:
    """Removes what a trial left that did not end."""
    name = folder_name(recipe)
    with contextlib.suppress(FileNotFoundError):
        out.filesystem.delete_file((out / f"{name}.json").path)
    with contextlib.suppress(FileNotFoundError):
        out.filesystem.delete_dir((out / name).path)


def write_row(out: Location, recipe: Recipe, row: Row) -> None:
    """A trial with a row is finished."""
    write_json(out / f"{folder_name(recipe)}.json", row)


def write_teacher(out: Location, metrics: dict[str, float], ranks: Ranks) -> None:
    """Ranks first: a teacher with metrics is finished."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **cast(dict[str, Any], ranks))
    _write_whole(out / TEACHER_RANKS, stream.getvalue())
    write_json(out / TEACHER, metrics)


def read_teacher(out: Location) -> dict[str, float] | None:
    """The teacher's metrics, where they have been measured."""
    place = out / TEACHER
    return cast(dict[str, float], json.loads(place.read())) if place.exists() else None


def read_teacher_ranks(out: Location) -> Ranks:
    """What `write_teacher` wrote."""
    with np.load(io.BytesIO((out / TEACHER_RANKS).read())) as arrays:
        return {name: arrays[name] for name in arrays.files}


def write_json(place: Location, content: Any) -> None:
    """Whole or not at all."""
    _write_whole(place, (json.dumps(content, indent=2) + "\n").encode())


def _write_whole(place: Location, content: bytes) -> None:
    if not place.is_local:
        place.write(content)
        return
    draft = f"{place.path}.partial-{os.getpid()}"
    locate(draft).write(content)
    os.replace(draft, place.path)
