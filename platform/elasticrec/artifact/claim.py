"""A place in; the sole right to it, for as long as a block runs, out.

The kernel holds it for the process (flock), so it is gone with the process, however that ends: there is no old claim
to clear away. Object stores have nothing of the kind; there nothing is claimed.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from elasticrec.artifact.location import Location


class ClaimedError(Exception):
    """Another process, or another block of this one, has it; the text says who."""


@contextlib.contextmanager
def claimed(place: Location, what: str) -> Iterator[None]:
    """Holds the claim on a file, which stays there and says who holds it, for `what`, or nothing.

    Raises:
        ClaimedError: somebody holds it; nothing is waited for.
    """
    if not place.is_local:
        yield
        return
    path = Path(place.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClaimedError(_told(file.read())) from None
        file.truncate()  # of one that was killed
        file.write(_holder(what))
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def _holder(what: str) -> str:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"what": what, "host": socket.gethostname(), "pid": os.getpid(), "since": since})


def _told(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"{holder['what']}, process {holder['pid']} of {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it is being written
        return "just begun"
