"""What operators may wish, how it becomes a command line, and what is told when it fails."""

import asyncio
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from elasticrec.artifact.registry import Reference
from elasticrec.serving import moves
from elasticrec.serving.api import MoveRefusedError, MoveRequest
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
