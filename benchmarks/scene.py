"""What serving benchmarks share: a registry of two versions, a seeded store, keys, and loads against a port.

The network has the size of the issue (d = 64, 2 blocks, L = 50, ML-100K's items) and random weights: what is measured
is time, which does not depend on them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import torch

from benchmarks.loadgen import Plan
from elasticrec.artifact.bundle import write_bundle
from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, free_port
from elasticrec.cli.publishing import publish_ready
from elasticrec.cli.web import get
from elasticrec.data.prepare import prepare_dataset
from elasticrec.data.sequences import open_store
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.auth import create_key

NAME = "films"
USERS = 500


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Files of a benchmark."""

    folder: Path
    bodies: list[str]
    key: str

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "registry")

    @property
    def reference(self) -> str:
        return f"{self.registry.root.uri}#{NAME}@production"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def arguments(self, **others: Any) -> dict[str, Any]:
        """Of the application: keys, events, seeded histories."""
        return {
            "bundle": self.reference,
            "events": str(self.folder / "events.sqlite"),
            "seed": str(self.data),
            "keys": str(self.folder / "keys.json"),
        } | others


def make_scene(folder: Path, versions: int = 2, data: Path | None = None) -> Scene:
    """Publishes versions 1 to `versions`; production is 1. `data`: ML-100K as it was prepared, where no net is."""
    if data is None:
        prepare_dataset("ml-100k", folder / "data")
    else:
        shutil.copytree(data, folder / "data")
    store = open_store(folder / "data")
    registry = Registry(folder / "registry")
    for seed in range(versions):
        torch.manual_seed(seed)
        encoder = EncoderConfig(width=64, blocks=2, max_length=50)
        network = Network(NetworkConfig(encoder=encoder), store.n_items)
        bundle = write_bundle(folder / f"bundle-{seed + 1}", network, store.items(), name=NAME, version="0")
        publish_ready(registry, bundle, NAME)
    registry.set_label(NAME, "production", "1")
    users = [str(user) for user in store.users().column("user_id").to_pylist()][:USERS]
    key = create_key(folder / "keys.json", "load", ("read", "events"))
    return Scene(folder=folder, bodies=[json.dumps({"user_id": user, "k": 10}) for user in users], key=key)


@dataclass(frozen=True, slots=True)
class Loading:
    """A generator at work, and the file that it tells its outcome in: a pipe that is read late loses what it held."""

    process: subprocess.Popen[str]
    told: IO[str]

    def outcome(self) -> dict[str, Any]:
        """What the generator tells; waits for its end."""
        if self.process.wait() != 0:
            raise RuntimeError(f"the load generator ended with {self.process.returncode}")
        self.told.seek(0)
        found: dict[str, Any] = json.load(self.told)
        return found


@contextmanager
def loading(plan: Plan) -> Iterator[Loading]:
    """The generator in its own process, while the block runs."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        command = [sys.executable, "-m", "benchmarks.loadgen"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=told, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(plan)))
        process.stdin.close()
        try:
            yield Loading(process, told)
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()


def load(plan: Plan) -> dict[str, Any]:
    with loading(plan) as generator:
        return generator.outcome()


@contextmanager
def child(
    command: list[str], env: dict[str, str], log: Path, url: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the block ends; ended with its group, by id."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | env, stdout=output, stderr=output, start_new_session=True)
    try:
        if url is not None:
            wait_ready(url, process, log)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            break
        try:
            if get(url, timeout_s=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"nothing answers on {url}; the log ends: {log.read_text()[-2_000:]}")


def pids_of(cluster: LocalCluster, class_name: str) -> list[int]:
    """Processes of the live actors of a class."""
    wanted = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE&limit=10000&detail=1"
    answer = get(f"{cluster.dashboard_url}/api/v0/actors?{wanted}", timeout_s=30).json()
    return [int(one["pid"]) for one in answer["data"]["result"]["result"] if class_name in one["class_name"]]


def wait_running(cluster: LocalCluster, replicas: int, timeout_s: float = 120) -> None:
    """Until so many fused replicas run, and no other."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with suppress(httpx.HTTPError, KeyError):
            place = f"{cluster.dashboard_url}/api/serve/applications/"
            found = get(place, timeout_s=30).json()["applications"]["recommender"]
            states = [one["state"] for one in found["deployments"]["FusedReplica"]["replicas"]]
            if states == ["RUNNING"] * replicas:
                return
        time.sleep(0.5)
    raise RuntimeError(f"there are not {replicas} replicas within {timeout_s:g} s")


def ceiling_per_s(connections: int, seconds: float) -> float:
    """What the generator does against a server that only echoes, on the same cores."""
    port = free_port()
    with child([sys.executable, "-m", "benchmarks.loadgen", "echo", str(port)], {}, Path("/dev/null")):
        return float(load(Plan(port=port, connections=connections, seconds=seconds, warm_s=0.5))["per_s"])


def registry_command(cluster: LocalCluster, scene: Scene, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elasticrec.cli", "registry", words[0], "--name", NAME]
    command += ["--root", scene.registry.root.uri, *words[1:]]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=300, check=False)


@contextmanager
def promotion(cluster: LocalCluster, scene: Scene, version: str) -> Iterator[Callable[[], None]]:
    """What promotes a version, by a process that has started and imported already, as an operator's on another host.

    The console's move starts such a process beside the replicas; what that costs is not in here.
    """
    imports = "import sys, ray.serve, torch; from elasticrec.cli import main, registry, rollout"
    code = f"{imports}; print(flush=True); sys.stdin.readline(); main.main()"
    words = ["registry", "promote", "--name", NAME, "--root", scene.registry.root.uri, "--version", version]
    command = [sys.executable, "-c", code, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=cluster.env, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()

        def promote() -> None:
            told, _ = process.communicate("go\n", timeout=300)
            assert process.returncode == 0, told

        yield promote
