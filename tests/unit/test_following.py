"""Replicas that are told of other versions: Serve does not wait for them, one of a host loads at a time."""

import asyncio
import multiprocessing as mp
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elasticrec.errors import BundleError
from elasticrec.serving.between import SLICE_S, rested
from elasticrec.serving.following import in_turn
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.shelf import Shelf
from elasticrec.serving.versions import Loaded, Versions
from tests.unit.test_rollout import Fixed

SOON_S = 20.0


def held_back(gate: threading.Event) -> Callable[[str], Any]:
    """Loads 'slow' when the gate opens, all else at once; 'broken' raises what nobody has thought of."""

    def load(uri: str) -> Loaded:
        if uri == "broken":
            raise KeyError("weights")
        if uri == "slow":
            assert gate.wait(SOON_S)
        fixed: Any = Fixed(uri)
        return Loaded(model=fixed, recommend=fixed.recommend)

    return load


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray Serve
    from elasticrec.serving.http_replica import HttpReplica
    from elasticrec.serving.model_replica import ModelReplica


def http_replica(load: Callable[[str], Any]) -> HttpReplica:
    replica = HttpReplica()
    replica._versions = Versions(load)
    return replica


def model_replica(load: Callable[[str], Any]) -> ModelReplica:
    replica = ModelReplica.__new__(ModelReplica)  # without a device and Serve
    replica._told = replica._asked = None
    replica._changing = asyncio.Lock()
    replica._scorers = Shelf(load)
    return replica


REPLICAS = pytest.mark.parametrize("made", [http_replica, model_replica])


async def asked_for(replica: Any, rollout: Rollout) -> None:
    deadline_s = time.monotonic() + SOON_S
    while (await replica.rollout_state())["asked"] != rollout.plain():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


@REPLICAS
def test_serve_waits_for_the_first_versions_and_for_no_later_ones(made: Callable[..., Any]) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        replica = made(held_back(gate))
        first, later, last = Rollout(production="a"), Rollout(production="a", held=("slow",)), Rollout(production="b")
        await replica.reconfigure(first.plain())
        assert (await replica.rollout_state())["asked"] == first.plain()
        await asyncio.wait_for(replica.reconfigure(later.plain()), SOON_S)  # the gate is closed
        await replica.reconfigure(last.plain())
        await asyncio.sleep(0.05)
        assert (await replica.rollout_state())["asked"] == first.plain()
        gate.set()
        await asked_for(replica, last)  # in the order of being told

    asyncio.run(scenario())


@REPLICAS
def test_a_change_that_waits_is_left_out_when_a_newer_one_comes(made: Callable[..., Any]) -> None:
    loaded: list[str] = []
    gate = threading.Event()

    def load(uri: str) -> Any:
        loaded.append(uri)
        return held_back(gate)(uri)

    async def scenario() -> None:
        replica = made(load)
        for production in ("a", "slow", "b", "c"):
            await replica.reconfigure(Rollout(production=production).plain())
        await asyncio.sleep(0.05)
        state = await replica.rollout_state()
        assert (state["told"]["production"], state["asked"]["production"]) == ("c", "a")
        gate.set()
        await asked_for(replica, Rollout(production="c"))

    asyncio.run(scenario())
    assert loaded == ["a", "slow", "c"]


@REPLICAS
def test_the_first_versions_are_loaded_when_serve_hears_of_them(made: Callable[..., Any]) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        replica = made(held_back(gate))
        start = asyncio.create_task(replica.reconfigure(Rollout(production="slow").plain()))
        await asyncio.sleep(0.05)
        assert not start.done()
        gate.set()
        await asyncio.wait_for(start, SOON_S)
        assert (await replica.rollout_state())["asked"] == Rollout(production="slow").plain()

    asyncio.run(scenario())


@REPLICAS
def test_what_cannot_be_loaded_is_refused_whatever_it_raises(made: Callable[..., Any]) -> None:
    async def scenario() -> None:
        replica = made(held_back(threading.Event()))
        with pytest.raises(BundleError, match="KeyError: 'weights'"):
            await replica.reconfigure(Rollout(production="broken").plain())
        await replica.reconfigure(Rollout(production="a").plain())
        wanted = Rollout(production="broken")
        await replica.reconfigure(wanted.plain())
        await asked_for(replica, wanted)
        assert (await replica.rollout_state())["refused"] == {"broken": "KeyError: 'weights'"}

    asyncio.run(scenario())


def test_a_change_that_fails_behind_serves_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Versions):
        async def apply(self, wanted: Rollout) -> None:
            if self.answers:
                raise RuntimeError("no room")
            await super().apply(wanted)

    async def scenario() -> None:
        replica = HttpReplica()
        replica._versions = Broken(held_back(threading.Event()))
        await replica.reconfigure(Rollout(production="a").plain())
        await replica.reconfigure(Rollout(production="b").plain())
        await asyncio.sleep(0.05)
        assert replica._versions.version == "a"

    asyncio.run(scenario())
    assert "a change of versions failed, those before stay" in caplog.text
    assert "no room" in caplog.text


def _load_and_tell(lock: Path, answers: bool, spans: Any, here: Any) -> None:
    def load(uri: str) -> None:
        started_s = time.monotonic()
        time.sleep(0.5)
        spans.put((started_s, time.monotonic()))

    here.wait(60)
    in_turn(load, lambda: answers, lock)("films")


@pytest.mark.parametrize("answers", [True, False])
def test_replicas_of_a_host_load_in_turn_once_they_answer(answers: bool, tmp_path: Path) -> None:
    spawn = mp.get_context("spawn")
    spans, here = spawn.Queue(), spawn.Barrier(2)
    of_each = (tmp_path / "lock", answers, spans, here)
    two = [spawn.Process(target=_load_and_tell, args=of_each, daemon=True) for _ in range(2)]
    for process in two:
        process.start()
    (_, first_end_s), (second_s, _) = sorted(spans.get(timeout=90) for _ in two)
    for process in two:
        process.join(SOON_S)
    assert (second_s >= first_end_s) == answers


def test_one_that_hangs_holds_up_the_others_of_its_host_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("elasticrec.serving.following.PATIENCE_S", 0.2)
    gate, inside = threading.Event(), threading.Event()

    def load(uri: str) -> str:
        if uri == "hangs":
            inside.set()
            assert gate.wait(SOON_S)
        return uri

    alone = in_turn(load, lambda: True, tmp_path / "lock")
    stuck = threading.Thread(target=alone, args=("hangs",))
    stuck.start()
    assert inside.wait(SOON_S)
    assert alone("films") == "films"
    assert "loading beside it" in caplog.text
    gate.set()
    stuck.join()


def test_a_lock_that_cannot_be_had_keeps_no_version_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "of somebody else")
    assert in_turn(str.upper, lambda: True, tmp_path / "lock")("films") == "FILMS"
    assert "no lock for loading in turn" in caplog.text
    assert not (tmp_path / "of somebody else").exists()


def test_the_lock_goes_with_what_raises(tmp_path: Path) -> None:
    def load(uri: str) -> str:
        if uri == "bad":
            raise ValueError("bad")
        return uri

    alone = in_turn(load, lambda: True, tmp_path / "lock")
    with pytest.raises(ValueError, match="bad"):
        alone("bad")
    assert alone("good") == "good"


def test_rests_leave_nothing_out_and_come_between_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    rests: dict[int, float] = {}  # after so many things, how long
    sleep = time.sleep
    monkeypatch.setattr("elasticrec.serving.between.time.sleep", lambda seconds: rests.update({len(given): seconds}))
    for number in rested(range(40)):
        given.append(number)
        sleep(SLICE_S if number % 10 == 9 else 0)
    assert given == list(range(40))
    assert {10, 20, 30, 40} <= rests.keys()
    assert min(rests.values()) > SLICE_S
