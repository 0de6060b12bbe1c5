"""A wish of an operator in, the command line that fulfils it run, what it said out.

A rollout is told to all replicas, also to the one that is asked, and watches them all; it is a program of its own
(`elasticrec registry …`) for whoever starts it, and so it is here.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from elasticrec.artifact.registry import Reference, Registry
from elasticrec.serving.api.operators import MoveRequest
from elasticrec.serving.api.problems import MoveRefusedError

_KEPT: Final = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS")
_PREFIX: Final = "error: "


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Of the application `app` on the cluster at `address`, which serves `reference`."""

    reference: Reference
    app: str
    address: str
    _running: set[asyncio.Task[str]] = field(default_factory=set)

    def versions(self) -> dict[str, Any]:
        """Name, versions and labels of the model, and which label the application follows; reads the registry."""
        registry, name = Registry(self.reference.root), self.reference.name
        known = {"name": name, "versions": registry.versions(name), "labels": registry.labels(name)}
        return known | {"label": self.reference.ref}

    async def make(self, wish: MoveRequest) -> str:
        """The last line that the command said. A move goes on when nobody waits for it any more.

        One at a time: the registry keeps out moves of other replicas and commands, this one need not start a process.

        Raises:
            MoveRefusedError: with its reason, or another move goes on.
        """
        if self._running:
            raise MoveRefusedError("another move goes on in this replica; wait for its end, then look at the labels")
        move = asyncio.create_task(self._run(wish))
        self._running.add(move)
        move.add_done_callback(self._running.discard)
        return await asyncio.shield(move)

    async def _run(self, wish: MoveRequest) -> str:
        child = await asyncio.create_subprocess_exec(
            *self._command(wish),
            env=_environment(os.environ, self.address),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        told, problem = await child.communicate()
        if child.returncode:
            raise MoveRefusedError(_last(problem).removeprefix(_PREFIX) or f"it ended with status {child.returncode}")
        return _last(told)

    def _command(self, wish: MoveRequest) -> Sequence[str]:
        words = [sys.executable, "-m", "elasticrec.cli", "registry", wish.action]
        words += ["--name", self.reference.name, "--root", self.reference.root, "--app", self.app]
        words += [] if wish.version is None else ["--version", wish.version]
        words += [] if wish.leaving is None else ["--leaving", wish.leaving]
        words += ["--percent", f"{wish.percent:g}"] if wish.percent is not None else ["--label", self.reference.ref]
        return [*words, "--reason", wish.reason]


def _environment(own: Mapping[str, str], address: str) -> dict[str, str]:
    """That of a terminal beside the cluster: a replica's own variables of Ray are those of a worker."""
    kept = {name: value for name, value in own.items() if not name.startswith("RAY_") or name in _KEPT}
    return kept | {"RAY_ADDRESS": address}


def _last(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
