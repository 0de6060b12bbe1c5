"""Elastic training on real nodes: workers, nodes, drivers and checkpoints are lost, samples are not."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from elasticrec.artifact.bundle import verify_bundle
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, LocalNode, local_cluster
from elasticrec.config import load, to_mapping
from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.sequences import Sequences, Store, open_store, write_store
from elasticrec.data.split import split
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.model.own import ALLOWED, OwnBlockConfig
from elasticrec.training.host import LocalHost, Preempted
from elasticrec.training.journal import STARTS, STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.run import LOCK_FILE, CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig

pytestmark = pytest.mark.timeout(1200)
N_USERS, N_ITEMS, STEPS_PER_EPOCH = 100, 300, 3
NAP_S = 0.05  # of each step, so that a test knows how long a training takes at least


@pytest.fixture(scope="module", autouse=True)
def napping() -> Iterator[None]:
    """Blocks of napping_block.py may be used here, by the command and by workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ALLOWED, "napping_block")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.syspath_prepend(Path(__file__).parent)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users that walk through the items in strides of their own."""
    import pyarrow as pa

    generator = np.random.default_rng(0)
    length_U = generator.integers(3, 60, N_USERS)
    walks = [(generator.integers(N_ITEMS) + generator.integers(1, 4) * np.arange(n)) % N_ITEMS + 1 for n in length_U]
    sequences = Sequences(
        item_E=np.concatenate(walks).astype(np.int32), offset_U1=np.concatenate([[0], np.cumsum(length_U)])
    )
    users = pa.table({"user_index": np.arange(N_USERS), "user_id": [f"u{user}" for user in range(N_USERS)]})
    items = pa.table(
        {
            "item_index": np.arange(1, N_ITEMS + 1),
            "item_id": [f"i{item}" for item in range(1, N_ITEMS + 1)],
            "title": [f"Item {item}" for item in range(1, N_ITEMS + 1)],
            "categories": [["walk"]] * N_ITEMS,
            "count": np.bincount(sequences.item_E, minlength=N_ITEMS + 1)[1:],
        }
    )
    path = tmp_path_factory.mktemp("walks") / "store"
    write_store(path, sequences, users, items, command="test")
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=2)) as running:
        yield running


def run_config(data: Path, storage: Path, name: str, epochs: int) -> RunConfig:
    """Without dropout, so that the curve does not depend on how a step was cut; a checkpoint every other second."""
    encoder = EncoderConfig(width=32, blocks=1, max_length=40, dropout=0.0, block=napping_for(NAP_S))
    return RunConfig(
        name=name,
        data=data,
        storage=storage,
        epochs=epochs,
        network=NetworkConfig(encoder=encoder),
        plan=PlanConfig(batch_users=32),
        validation=ValidationConfig(every_epochs=20, patience=1000),
        checkpoint=CheckpointConfig(interval_s=2.0),
        elastic=ElasticConfig(resize_check_s=3.0),
    )


def napping_for(seconds: float) -> OwnBlockConfig:
    return OwnBlockConfig(target="napping_block:Napping", options=json.dumps({"seconds": seconds}))


class Training:
    """`elasticrec train` as a child process, as a user starts it."""

    def __init__(self, run: RunConfig, cluster: LocalCluster) -> None:
        self.run = run
        run.storage.mkdir(parents=True, exist_ok=True)
        self._log = run.storage / f"{run.name}.log"
        config = run.storage / f"{run.name}.yaml"
        config.write_text(yaml.safe_dump(to_mapping(run)))
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "elasticrec.cli", "train", "--config", str(config)],
                env=cluster.env,
                stdout=log,
                stderr=log,
            )

    def steps(self) -> list[dict[str, Any]]:
        return read(self.run.folder / STEPS)

    def starts(self) -> list[dict[str, Any]]:
        return read(self.run.folder / STARTS)

    def wait_for(self, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.1)

    def wait_until(self, reached: Callable[[], bool], timeout_s: float = 60) -> None:
        """Whether or not the command still runs."""
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def is_watched(self) -> bool:
        """Whether a driver holds the run's lock."""
        inode = (self.run.folder / LOCK_FILE).stat().st_ino
        return any(line.split()[5].endswith(f":{inode}") for line in Path("/proc/locks").read_text().splitlines())

    def finish(self, timeout_s: float = 240) -> None:
        assert self.process.wait(timeout_s) == 0, self.log()

    def log(self) -> str:
        return self._log.read_text()[-4000:]

    def checkpoints(self) -> list[Path]:
        return sorted(state.parent for state in self.run.folder.glob("checkpoints/*/state.json"))

    def saved_step(self) -> int:
        """Where the newest checkpoint stands; -1 without any, or when it was just replaced by a newer one."""
        try:
            return int(json.loads((self.checkpoints()[-1] / "state.json").read_text())["step"])
        except (IndexError, FileNotFoundError):
            return -1


def train_workers(cluster: LocalCluster) -> set[int]:
    """Process ids of the workers that train now."""
    return of_title(cluster, "ray::RayTrainWorker")


def of_title(cluster: LocalCluster, begin: str) -> set[int]:
    """Process ids of those whose title begins like that."""

    def title(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return ""

    return {pid for pid in cluster.processes() if title(pid).startswith(begin)}


def assert_every_sample_once(training: Training, store: Store) -> None:
    """The workers' own counts of every step against the plan."""
    run = training.run
    plan = Plan(run.plan, store.sequences, split(run.split, store.sequences), run.network.encoder.max_length)
    lines = training.steps()
    assert plan.steps_per_epoch == STEPS_PER_EPOCH
    assert [line["step"] for line in lines] == list(range(len(lines)))
    for line in lines:
        users = plan.users(line["step"])
        keys = [(user + 1) * 2654435761 % 2**32 for user in users.tolist()]
        assert (line["samples"], line["sample_key"]) == (len(users), sum(keys))


def assert_whole(training: Training) -> None:
    """Every step of every epoch, and a bundle."""
    assert len(training.steps()) == training.run.epochs * STEPS_PER_EPOCH
    verify_bundle(training.run.folder / "bundle")


class Until(LocalHost):
    """Gives notice at a meeting, and so ends a run in order."""

    meetings_left = 0

    def leaving(self) -> bool:
        self.meetings_left -= 1
        return self.meetings_left < 0


def assert_same_curve(training: Training, store: Store, tmp_path: Path) -> None:
    """Equal to the first steps of a run of one process that nothing happened to, and which never rests."""
    losses = [line["loss"] for line in training.steps()]
    encoder = replace(training.run.network.encoder, block=napping_for(0))
    network = replace(training.run.network, encoder=encoder)
    run = replace(training.run, storage=tmp_path, name="undisturbed", network=network)
    host = Until(run.folder)
    host.meetings_left = len(losses)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.suppress(Preempted):
        Loop(run, store, host).train()
    torch.set_num_threads(threads)
    undisturbed = [line["loss"] for line in read(run.folder / STEPS)]
    np.testing.assert_allclose(losses, undisturbed[: len(losses)], rtol=2e-3)


def test_a_killed_worker_costs_no_sample(cluster: LocalCluster, data: Path, tmp_path: Path) -> None:
    training = Training(run_config(data, tmp_path / "runs", "worker", epochs=80), cluster)
    training.wait_for(lambda: len(training.checkpoints()) > 0 and len(training.steps()) > 0)
    before = train_workers(cluster)
    assert len(before) == 2
    rival = Training(training.run, cluster)  # takes a while to start, and is refused
    os.kill(min(before), signal.SIGKILL)
    assert rival.process.wait(60) == 2
    assert "is being trained by another process" in rival.log()
    training.wait_for(lambda: len(train_workers(cluster) - before) == 2)
    training.finish()
    assert_every_sample_once(training, open_store(data))
    assert_whole(training)
    assert_same_curve(training, open_store(data), tmp_path)


def test_the_same_command_goes_on_whatever_ended_it(cluster: LocalCluster, data: Path, tmp_path: Path) -> None:
    run = run_config(data, tmp_path / "runs", "driver", epochs=180)
    given_up = Training(replace(run, elastic=replace(run.elastic, max_failures=0)), cluster)
    given_up.wait_for(lambda: len(given_up.checkpoints()) > 0)
    os.kill(min(train_workers(cluster)), signal.SIGKILL)
    assert given_up.process.wait(120) == 2
    assert "failed more than 0 times" in given_up.log()
    assert "Traceback" not in given_up.log()

    # Killed, a run goes on for a while. When nobody comes it saves and leaves.
    forgotten = Training(replace(run, elastic=replace(run.elastic, alone_s=5.0)), cluster)
    begin = forgotten.saved_step()
    forgotten.wait_for(lambda: forgotten.saved_step() > begin)
    forgotten.kill()
    forgotten.wait_until(lambda: not of_title(cluster, "ray::KeptController"))
    assert not train_workers(cluster)
    assert forgotten.saved_step() == len(forgotten.steps()) < run.epochs * STEPS_PER_EPOCH

    # The same command finds it as it was: no worker starts again.
    first = Training(run, cluster)
    starts, steps = len(first.starts()), len(first.steps())
    first.wait_for(lambda: len(first.steps()) > steps)
    first.kill()
    second = Training(run, cluster)
    second.wait_for(second.is_watched)
    steps = len(second.steps())
    second.wait_for(lambda: len(second.steps()) > steps + 10)
    assert len(second.starts()) == starts + 1

    # Workers of a run whose first driver is dead are replaced as any others.
    os.kill(min(train_workers(cluster)), signal.SIGKILL)
    second.wait_for(lambda: len(second.starts()) == starts + 2)
    steps = len(second.steps())
    second.wait_for(lambda: len(second.steps()) > steps and len(second.checkpoints()) == 2)

    # Who ends the command in order ends the run, which loses nothing.
    second.process.terminate()
    assert second.process.wait(60) == 128 + signal.SIGTERM, second.log()
    assert not train_workers(cluster)
    assert second.saved_step() == len(second.steps()) < run.epochs * STEPS_PER_EPOCH

    # With the process that controls it lost, too, it starts again, and from the checkpoint before a torn one.
    third = Training(run, cluster)
    begin = third.saved_step()
    third.wait_for(lambda: third.saved_step() > begin and len(third.checkpoints()) == 2)
    third.kill()
    (controller,) = of_title(cluster, "ray::KeptController")
    os.kill(controller, signal.SIGKILL)
    third.wait_until(lambda: not train_workers(cluster))
    before, newest = third.checkpoints()[-2:]
    whole = json.loads((before / "state.json").read_text())["step"]
    weights = newest / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    fourth = Training(run, cluster)
    fourth.finish()
    assert fourth.starts()[-1]["step"] == whole
    assert_every_sample_once(fourth, open_store(data))
    assert_whole(fourth)

    # Another plan under the same name is refused before anything starts.
    other = Training(replace(run, epochs=run.epochs + 1), cluster)
    assert other.process.wait(60) == 2
    assert "give this run another name" in other.log()


def test_a_node_that_joins_is_drained_or_dies_costs_no_sample(data: Path, tmp_path: Path) -> None:
    with local_cluster(LocalClusterConfig(num_cpus=1, train_slots=1)) as cluster:
        training = Training(run_config(data, tmp_path / "runs", "node", epochs=100_000), cluster)
        training.wait_for(lambda: len(training.steps()) > 0)
        node = cluster.add_node(num_cpus=1, train_slots=1)
        training.wait_for(lambda: training.steps()[-1]["workers"] == 2)
        drain(cluster, node)
        training.wait_for(lambda: training.steps()[-1]["workers"] == 1)
        assert training.starts()[-1]["again"] == 0
        cluster.remove_node(node)

        node = cluster.add_node(num_cpus=1, train_slots=1)
        training.wait_for(lambda: training.steps()[-1]["workers"] == 2)
        joined = training.steps()[-1]["step"]
        training.wait_for(lambda: training.saved_step() > joined)
        written = training.saved_step()
        cluster.remove_node(node)
        training.wait_for(lambda: training.steps()[-1]["workers"] == 1)
        alone = training.steps()[-1]["step"]
        training.wait_for(lambda: training.steps()[-1]["step"] > alone + 20)

        training.kill()
    assert training.starts()[-1]["step"] >= written
    assert {line["workers"] for line in training.steps()} == {1, 2}
    assert_every_sample_once(training, open_store(data))
    assert_same_curve(training, open_store(data), tmp_path)


def drain(cluster: LocalCluster, node: LocalNode) -> None:
    """The notice that a spot instance gets."""
    ray = str(Path(sys.executable).with_name("ray"))
    notice = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "test",
        "--deadline-remaining-seconds",
        "60",
    ]
    command = [ray, "drain-node", "--address", cluster.address, "--node-id", node.node_id, *notice]
    subprocess.run(command, env=cluster.env, check=True, capture_output=True)


def test_a_cluster_without_slots_is_told_so(data: Path, tmp_path: Path) -> None:
    with local_cluster(LocalClusterConfig(num_cpus=1, train_slots=0)) as cluster:
        training = Training(run_config(data, tmp_path / "runs", "slots", epochs=1), cluster)
        assert training.process.wait(60) == 2
    assert "--resources" in training.log()


def test_the_config_of_the_docs_is_valid() -> None:
    load(RunConfig, Path(__file__).resolve().parents[2] / "configs" / "ml-100k.yaml")
