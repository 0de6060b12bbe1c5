"""What operators may wish, how it becomes a command line, and what is told when it fails."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from elasticrec.artifact.bundle import write_bundle
from elasticrec.artifact.registry import Reference, Registry
from elasticrec.errors import RegistryError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving import moves
from elasticrec.serving.api.operators import MoveRequest
from elasticrec.serving.api.problems import MoveRefusedError
from elasticrec.serving.moves import Moves


@pytest.fixture
def films(tmp_path: Path) -> Moves:
    return Moves(reference=Reference(root=str(tmp_path), name="films", ref="production"), app="shop", address="h:1")


@pytest.mark.parametrize(
    "wish",
    [
        {"action": "promote"},
        {"action": "rollback", "version": "1"},
        {"action": "canary", "version": "1"},
        {"action": "promote", "version": "1", "percent": 5},
        {"action": "canary", "version": "1", "percent": 101},
        {"action": "promote", "version": "--root=/etc"},
        {"action": "promote", "version": "1", "reason": "--label=x"},
        {"action": "publish", "version": "1"},
        {"action": "promote", "version": "1", "leaving": "2"},
        {"action": "rollback", "leaving": "--root=/etc"},
    ],
)
def test_a_wish_that_fits_no_command_is_refused(wish: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MoveRequest.model_validate(wish)


def test_a_wish_becomes_the_command_that_an_operator_would_type(films: Moves) -> None:
    def words(**wish: object) -> str:
        return " ".join(films._command(MoveRequest.model_validate(wish))[3:])

    common = f"--name films --root {films.reference.root} --app shop"
    promoted = words(action="promote", version="2", reason="better")
    assert promoted == f"registry promote {common} --version 2 --label production --reason better"
    assert words(action="rollback") == f"registry rollback {common} --label production --reason console"
    leaving = words(action="rollback", leaving="2")
    assert leaving == f"registry rollback {common} --leaving 2 --label production --reason console"
    canary = words(action="canary", version="2", percent=2.5)
    assert canary == f"registry canary {common} --version 2 --percent 2.5 --reason console"


def test_a_replicas_own_variables_do_not_reach_the_command() -> None:
    own = {"PATH": "/bin", "RAY_JOB_ID": "7", "RAY_AUTH_TOKEN": "secret", "RAY_ADDRESS": "old"}
    assert moves._environment(own, "h:1") == {"PATH": "/bin", "RAY_AUTH_TOKEN": "secret", "RAY_ADDRESS": "h:1"}


def test_what_the_command_says_last_is_told(films: Moves, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(code: str) -> None:
        monkeypatch.setattr(Moves, "_command", lambda *_: [sys.executable, "-c", code])

    wish = MoveRequest(action="rollback")
    runs("print('first'); print('films@production is version 1')")
    assert asyncio.run(films.make(wish)) == "films@production is version 1"
    runs("import sys; print('noise', file=sys.stderr); print('error: no way back', file=sys.stderr); sys.exit(2)")
    with pytest.raises(MoveRefusedError, match=r"^no way back$"):
        asyncio.run(films.make(wish))
    runs("import sys; sys.exit(3)")
    with pytest.raises(MoveRefusedError, match="status 3"):
        asyncio.run(films.make(wish))


def test_a_move_outlives_its_request_and_keeps_the_next_one_out(
    films: Moves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, ended = tmp_path / "end", tmp_path / "ended"
    code = f"""
import pathlib, time
while not pathlib.Path({str(end)!r}).exists():
    time.sleep(0.01)
pathlib.Path({str(ended)!r}).touch()
print("moved")
"""
    monkeypatch.setattr(Moves, "_command", lambda *_: [sys.executable, "-c", code])
    wish = MoveRequest(action="rollback")

    async def scenario() -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await films.make(wish)
        with pytest.raises(MoveRefusedError, match="another move goes on"):
            await films.make(wish)
        end.touch()
        await asyncio.gather(*films._running)
        assert ended.exists()
        return await films.make(wish)

    assert asyncio.run(scenario()) == "moved"


HOLDER = """
import sys
from elasticrec.artifact.registry import Registry
with Registry(sys.argv[1]).moving("films", "promote --version 2"):
    print("moving", flush=True)
    sys.stdin.read()
"""
SLOW_COMMAND = """
import contextlib, pathlib, sys, time
from elasticrec.cli import main, registry

@contextlib.contextmanager
def running(*_):
    pathlib.Path(sys.argv[1], sys.argv[-1]).touch()
    while not pathlib.Path(sys.argv[1], "end").exists():
        time.sleep(0.01)
    yield None

registry.running = running
sys.exit(main.run(sys.argv[2:]))
"""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Versions 1 to 3 of `films`; production is 1."""
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=4)), 2)
    items = pa.table({"item_index": [1, 2], "item_id": ["a", "b"], "title": ["A", "B"],
                      "categories": [["x"], ["y"]], "count": [2, 1]})  # fmt: skip
    bundle = write_bundle(tmp_path / "bundle", network, items, name="films", version="0")
    registry = Registry(tmp_path / "registry")
    for _ in range(3):
        registry.publish(bundle, "films")
    registry.set_label("films", "production", "1")
    return registry


def test_who_moves_is_told_to_another_process_and_a_claim_ends_with_its_process(registry: Registry) -> None:
    command = [sys.executable, "-c", HOLDER, registry.root.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as mover:
        assert mover.stdout is not None
        assert mover.stdout.readline() == "moving\n"
        told = rf"another move of 'films' goes on \(promote --version 2, process {mover.pid} of"
        with pytest.raises(RegistryError, match=told), registry.moving("films", "rollback"):
            raise AssertionError("somebody else moves")
        os.kill(mover.pid, signal.SIGKILL)
    with registry.moving("films", "rollback"):
        with pytest.raises(RegistryError, match=r"goes on \(rollback, process"), registry.moving("films", "canary"):
            raise AssertionError("one block at a time, in one process, too")
        assert registry.set_label("films", "production", "2").version == "2"  # a step by itself
    with registry.moving("films", "canary"), pytest.raises(RegistryError, match="no model 'shows'"):
        registry.moving("shows", "canary").__enter__()


def test_of_two_moves_by_two_replicas_one_is_made_and_the_other_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, command = tmp_path / "inside", Moves._command
    inside.mkdir()

    def slowly(self: Moves, wish: MoveRequest) -> Sequence[str]:
        return [sys.executable, "-c", SLOW_COMMAND, str(inside), *command(self, wish)[3:]]

    monkeypatch.setattr(Moves, "_command", slowly)
    reference = Reference(root=registry.root.uri, name="films", ref="production")
    wishes = [
        MoveRequest(action="promote", version="3", reason="one"),
        MoveRequest(action="canary", version="2", percent=5, reason="other"),
    ]

    async def scenario() -> tuple[dict[str, str], list[str | BaseException]]:
        replicas = [Moves(reference=reference, app="shop", address="h:1") for _ in wishes]
        moves = [asyncio.create_task(replica.make(wish)) for replica, wish in zip(replicas, wishes, strict=True)]
        while not any(move.done() for move in moves) and len(list(inside.iterdir())) < len(moves):
            await asyncio.sleep(0.02)
        before = registry.labels("films")
        (inside / "end").touch()
        return before, await asyncio.gather(*moves, return_exceptions=True)

    before, answers = asyncio.run(scenario())
    assert before == {"production": "1"}
    (refused,) = (answer for answer in answers if isinstance(answer, BaseException))
    assert isinstance(refused, MoveRefusedError)
    assert refused.status == 409
    made = wishes[1 - answers.index(refused)]
    assert f"another move of 'films' goes on ({made.action} --version {made.version}" in str(refused)
    moved = {"production": "3"} if made.action == "promote" else {"production": "1", "canary": "2"}
    assert registry.labels("films") == moved
