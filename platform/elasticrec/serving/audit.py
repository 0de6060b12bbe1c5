"""Administrative calls of known keys in, a line of JSON for each out: who, what, when, and how it ended.

    {"at": "2026-01-31T12:00:00.000+00:00", "who": "ops", "what": "DELETE /v1/users/5e88…", "status": 200, …}

A user's id is written as its hash: the line proves that an erasure happened, to whoever knows the id.
"""

import asyncio
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote

from elasticrec.errors import ConfigError
from elasticrec.serving.events import user_hash

_USERS: Final = "/v1/users/"
_MAX_SHOWN_CHARACTERS: Final = 200
_MAX_METHOD_CHARACTERS: Final = 20
_LOGGER = logging.getLogger("elasticrec.audit")


class Audit:
    """Appends to a file that several replicas of a host share, or to the log `elasticrec.audit` without one."""

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError when the file cannot be written."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")  # the loop's own have other work than to wait
        self._descriptor: int | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            except OSError as error:
                raise ConfigError(
                    f"audit log '{path}' cannot be written: {error.strerror}; give another path"
                ) from None

    async def keep(self, who: str, method: str, path: str, status: int, request_id: str) -> None:
        """`write` in a thread; the line is written even when nobody waits for it any more."""
        line = (who, method, path, status, request_id)
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self.write, *line))

    def write(self, who: str, method: str, path: str, status: int, request_id: str) -> None:
        """One line, on disk when this returns, so not for an event loop; O_APPEND keeps lines of processes whole."""
        entry = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": who,
            "what": f"{method[:_MAX_METHOD_CHARACTERS]} {shown(path)}",
            "status": status,
            "request_id": request_id,
        }
        line = json.dumps(entry)
        if self._descriptor is None:
            _LOGGER.info("%s", line)
            return
        os.write(self._descriptor, (line + "\n").encode())
        os.fsync(self._descriptor)


def shown(path: str) -> str:
    """A path as logs may have it: without a user's id, in ASCII, and no longer than `_MAX_SHOWN_CHARACTERS`."""
    if path.startswith(_USERS):
        return _USERS + user_hash(path[len(_USERS) :])
    return quote(path[:_MAX_SHOWN_CHARACTERS], safe="/:@", errors="replace")[:_MAX_SHOWN_CHARACTERS]
