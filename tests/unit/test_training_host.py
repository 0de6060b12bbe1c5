"""What a host keeps of its checkpoints, and what the driver asks of the cluster before workers start."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch

from elasticrec.config import from_mapping
from elasticrec.errors import CheckpointError, ConfigError
from elasticrec.training import driver, spares
from elasticrec.training.checkpoint import STATE, TENSORS, Position, newest_valid, read_tensors, save
from elasticrec.training.host import LocalHost
from elasticrec.training.run import RunConfig
from elasticrec.training.scaling import room_for
from elasticrec.training.worker import RayHost

WHOLE = {"network.weight": torch.ones(3)}


def write(step: int) -> Callable[[Path], None]:
    return lambda folder: save(folder, WHOLE, Position(step=step, digest="d"))


def report(host: LocalHost, step: int) -> None:
    host.report({"step": step}, write(step))


def steps(host: LocalHost) -> list[int]:
    return [int(folder.name) for folder in host.checkpoints()]


def tear(host: LocalHost, step: int, damage: str) -> Path:
    folder = next(folder for folder in host.checkpoints() if int(folder.name) == step)
    if damage == "killed":
        (folder / STATE).unlink()
    else:
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    return folder


@pytest.fixture
def host(tmp_path: Path) -> LocalHost:
    """Whole checkpoints of steps 1 and 2."""
    host = LocalHost(tmp_path)
    for step in (1, 2):
        report(host, step)
    return host


def resumed(folder: Path) -> LocalHost:
    host = LocalHost(folder)
    newest = newest_valid(host.checkpoints(), "d")
    assert newest is not None
    host.goes_on_from(newest)
    return host


@pytest.mark.parametrize("damage", ["killed", "corrupt"])
def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(
    host: LocalHost, tmp_path: Path, damage: str
) -> None:
    tear(host, 2, damage)
    again = resumed(tmp_path)
    report(again, 3)
    assert steps(again) == [3, 1]
    tear(again, 3, damage)  # a second fault, right after: nothing but the interval is lost
    assert newest_valid(again.checkpoints(), "d") == tmp_path / "checkpoints" / f"{1:012d}"


def test_a_damaged_step_that_is_done_again_is_whole(host: LocalHost, tmp_path: Path) -> None:
    tear(host, 2, "corrupt")
    again = resumed(tmp_path)
    for step in (2, 3):
        report(again, step)
    assert steps(again) == [3, 2]


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    host: LocalHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = tmp_path / "checkpoints" / f"{0:012d}"
    stuck.write_text("not a folder", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        report(host, 3)
    assert steps(host) == [3, 2, 0]
    assert f"'{stuck}' is old and cannot be removed" in caplog.text


def test_what_was_read_does_not_hold_its_file(host: LocalHost) -> None:
    """On NFS a file that is mapped cannot be removed with its folder."""
    tensors = read_tensors(next(iter(host.checkpoints())))
    assert TENSORS not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert torch.equal(tensors["network.weight"], torch.ones(3))


def test_a_worker_that_cannot_write_leaves_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's report is a barrier."""
    told = []
    monkeypatch.setattr(ray.train, "report", told.append)
    host = object.__new__(RayHost)
    LocalHost.__init__(host, tmp_path)
    bad = {"network.weight": torch.tensor([float("nan")])}
    with pytest.raises(CheckpointError, match=r"'network\.weight' holds NaN"):
        host.report({"step": 4}, lambda folder: save(folder, bad, Position(step=4, digest="d")))
    assert told == [{"step": 4}]


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"CPU": 4.0, "slot": 8.0}, {"CPU": 3.0, "slot": 1.0, "GPU": 2.0}, {"slot": 5.0}]
    assert room_for({"CPU": 1.0, "slot": 1.0}, nodes) == 4 + 1
    assert room_for({"CPU": 1.0, "GPU": 0.5}, nodes) == 3
    assert [room_for({"GPU": share}, nodes) for share in (0.2, 0.1, 0.05)] == [10, 20, 40]
    assert room_for({"CPU": 1.0, "TPU": 1.0}, nodes) == 0


@pytest.mark.parametrize(
    ("elastic", "message"),
    [
        (
            {"gpus_per_worker": 1},
            r"the cluster has 0 'GPU', enough for 0 workers, .*gpus_per_worker \(0 trains on CPUs",
        ),
        (
            {"min_workers": 4, "max_workers": 4},
            r"has 3 'train_slot', enough for 3 workers, .*asks for 4; start its nodes",
        ),
        ({"min_workers": 3, "max_workers": 3}, r"no 3 workers \(elastic.min_workers\) fit on the cluster's nodes"),
    ],
)
def test_what_no_node_has_is_refused_before_ray_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, elastic: dict[str, int], message: str
) -> None:
    nodes = [{"CPU": 1.0, "train_slot": 3.0}, {"CPU": 4.0}]
    told = [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: told)
    driver._check_cluster(from_mapping(RunConfig, {"elastic": {"min_workers": 1, "max_workers": 1}}))
    with pytest.raises(ConfigError, match=message):
        driver._check_cluster(from_mapping(RunConfig, {"elastic": elastic}))


def test_a_driver_that_trains_again_starts_no_more_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        def get_job_id(self) -> str:
            return "job"

    started: list[int] = []
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(spares, "start", lambda *asked: started.append(asked[2]))
    for count in (2, 2, 3, 1):
        spares.fill({"NodeID": "one"}, json.dumps({}), count)
    spares.fill({"NodeID": "two"}, json.dumps({}), 1)
    assert started == [2, 1, 1]
