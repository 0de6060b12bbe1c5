"""Both cluster.yaml are what `ray up` accepts, and their start commands make a cluster, run here for real."""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts
from ray.util import get_node_ip_address

from elasticrec.cli.local_cluster import CLUSTER_MARK, free_port, kill_marked, marked
from tests.cluster.nodes import wait_for_nodes

ROOT = Path(__file__).parents[2]
ZERO_PORTS = "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 --runtime-env-agent-port=0"


FILES = {"local": ROOT / "cluster.yaml", "aws": ROOT / "deploy" / "aws" / "cluster.yaml"}
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
SETTINGS = {  # what Ray, Serve and Train read on every node
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_worker_niceness": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}


def read(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it_and_rejects_what_is_misspelt(name: str) -> None:
    validate_config(prepare_config(read(name)))
    with pytest.raises(Exception, match="worker_start_command"):
        validate_config(prepare_config(read(name) | {"worker_start_command": []}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resources", {"CPU": 0.5}, "0.5 is not of type 'integer'"),
        ("labels", {"kind": 1}, "1 is not of type 'string'"),
        ("max_worker", 1, "max_worker"),
    ],
)
def test_ray_rejects_a_wrong_type_of_node(key: str, value: object, message: str) -> None:
    config = read("aws")
    config["available_node_types"]["gpu"][key] = value
    with pytest.raises(Exception, match=message):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", FILES)
def test_start_commands_never_stop_what_runs(name: str) -> None:
    prepared = prepare_config(read(name))
    for key in STARTS:
        assert all("ray stop" not in command for command in prepared[key])


@pytest.mark.parametrize("name", FILES)
def test_setup_is_pinned(name: str) -> None:
    """It is `make setup`, whose installation takes constraints.txt, which has one version of Ray: that of here."""
    setup, _ = read(name)["setup_commands"]
    assert setup == 'make -C "${ELASTICREC_HOME:-$HOME/elasticrec}" setup'
    assert re.search(r"pip install .*-c constraints\.txt", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert f"\nray=={ray.__version__}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_types_of_nodes_on_aws() -> None:
    types = read("aws")["available_node_types"]
    assert read("aws")["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "train_slot" not in types["gateway"]["resources"]
    assert "GPU" not in types["gateway"]["resources"]
    for name in ("gpu", "spot"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["resources"]["train_slot"] > 0
    assert types["gpu"]["resources"]["GPU"] > 0
    assert types["spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= read("aws")["max_workers"]


@contextlib.contextmanager
def started(command: str, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the command as `ray up` would, and ends its process group by id."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a machine of the cluster has in its environment, and how the cluster is asked."""

    folder: Path
    mark: str
    env: dict[str, str]
    dashboard: str
    token: str
    own: str  # of the head alone

    @property
    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def wait(self, count: int) -> list[dict[str, Any]]:
        return wait_for_nodes(count, self.dashboard, self.token, self.logs)

    @contextlib.contextmanager
    def start(self, name: str, command: str, **settings: str) -> Iterator[None]:
        """A machine, started as `ray up` does it."""
        with started(command, self.env | settings, self.folder / f"{name}.log"):
            yield


@pytest.fixture
def place() -> Iterator[Place]:
    mark, token, port, dashboard_port = secrets.token_hex(8), secrets.token_hex(32), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="cy-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"HOME": folder, "PATH": f"{folder}:{Path(sys.executable).parent}:{env['PATH']}", CLUSTER_MARK: mark}
        env |= {"RAY_AUTH_TOKEN": token, "RAY_PORT": str(port), "RAY_HEAD_IP": get_node_ip_address()}
        env |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1", "ELASTICREC_HOME": str(ROOT)}
        env["RAY_OPTIONS"] = f"--block --object-store-memory=200000000 --metrics-export-port=0 {ZERO_PORTS}"
        own = f"--temp-dir={folder} --dashboard-port={dashboard_port} --ray-client-server-port={free_port()}"
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        try:
            yield Place(folder=Path(folder), mark=mark, env=env, dashboard=dashboard, token=token, own=own)
        finally:
            kill_marked(CLUSTER_MARK, mark)
    assert marked(CLUSTER_MARK, mark) == []


def recorded(folder: Path, command: str, **settings: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What a start command asks of Ray, by its own parser, and the environment Ray would see; nothing is started."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    two_gpus(programs)
    ray_itself = programs / "ray"
    ray_itself.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nenv -0 >&2\n")
    ray_itself.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "ELASTICREC_HOME": str(folder)} | settings
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=True)
    start, *words = done.stdout.split("\0")[:-1]
    assert start == "start"
    seen = dict(entry.split("=", 1) for entry in done.stderr.split("\0")[:-1])
    return scripts.start.make_context("start", words).params, seen


@pytest.mark.parametrize("name", FILES)
def test_a_shell_of_a_node_finds_ray_however_often_it_is_set_up(tmp_path: Path, name: str) -> None:
    _, path = read(name)["setup_commands"]
    programs = tmp_path / "elasticrec" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "ray").write_text("#!/bin/sh\n")
    (programs / "ray").chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    (tmp_path / ".bashrc").write_text("# it has no last newline")
    for _ in range(2):
        subprocess.run(["bash", "-c", path], env=env, check=True)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 2
    shell = ["bash", "--login", "-c", "-i", "source ~/.bashrc; command -v ray"]  # as Ray's updater asks
    found = subprocess.run(shell, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(programs / "ray")


def two_gpus(folder: Path) -> None:
    lister = folder / "nvidia-smi"
    lister.write_text("#!/bin/sh\nprintf 'GPU 0: H100\\nGPU 1: H100\\n'\n")
    lister.chmod(0o755)


@pytest.mark.parametrize(("kind", "slots"), [("gateway", 0), ("gpu", 2), ("spot", 1)])
def test_each_kind_of_node_offers_its_train_slots(tmp_path: Path, kind: str, slots: int) -> None:
    (worker,) = read("local")["worker_start_ray_commands"]
    asked, seen = recorded(tmp_path, worker, NODE_KIND=kind, RAY_HEAD_IP="head.example.org")
    assert asked["address"] == "head.example.org:6379"
    assert json.loads(asked["resources"]) == {"train_slot": slots}
    assert asked["labels"] == f"kind={kind}"
    assert {name: seen.get(name) for name in SETTINGS} == SETTINGS


def test_the_head_of_your_own_machines_offers_nothing(tmp_path: Path) -> None:
    (head,) = read("local")["head_start_ray_commands"]
    asked, seen = recorded(tmp_path, head)
    assert (asked["head"], asked["port"], asked["num_cpus"], asked["num_gpus"]) == (True, 6379, 0, 0)
    assert {name: seen.get(name) for name in SETTINGS} == SETTINGS


def test_a_wrong_kind_of_node_is_refused(place: Place) -> None:
    (worker,) = read("local")["worker_start_ray_commands"]
    done = subprocess.run(
        ["bash", "-c", worker], env=place.env | {"NODE_KIND": "gpus"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "NODE_KIND is 'gpus'; it must be gateway, gpu or spot\n")


def test_start_commands_make_a_cluster_and_the_notice_of_a_spot_node_drains_it(place: Place) -> None:
    """Of AWS, and a worker of the other file: start commands of both meet Ray here, on as few nodes as that takes.

    Resources as Ray's updater gives them; the metadata service is one of ours, which speaks as AWS' does.
    """
    (head,), (worker, watch) = (read("aws")[key] for key in STARTS)
    (own_worker,) = read("local")["worker_start_ray_commands"]
    types = read("aws")["available_node_types"]
    two_gpus(place.folder)
    with contextlib.ExitStack() as machines:
        metadata = machines.enter_context(metadata_service())
        head_options = {"RAY_OPTIONS": f"{place.env['RAY_OPTIONS']} {place.own}"}
        machines.enter_context(place.start("head", head, **override(types["head"]), **head_options))
        place.wait(1)
        machines.enter_context(place.start("spot", worker, **override(types["spot"])))
        nodes = place.wait(2)
        settings = raylet_environments(place.mark)
        machines.enter_context(
            place.start("watch", f"{watch} wait", NOTICE_URL=f"http://127.0.0.1:{metadata.server_address[1]}")
        )
        while metadata.asked < 2:  # twice there is no notice
            time.sleep(0.05)
        metadata.ends = datetime.now(UTC) + timedelta(seconds=60)
        left = place.wait(1)
        # Only now: drain.py wants one worker on its machine, and all of these nodes are on this one.
        cpus = f"{place.env['RAY_OPTIONS']} --num-cpus=1"
        machines.enter_context(place.start("gpu", own_worker, NODE_KIND="gpu", RAY_OPTIONS=cpus))
        nodes += [node for node in place.wait(2) if node["labels"].get("kind") == "gpu"]
        settings += raylet_environments(place.mark)
    totals = {node["labels"].get("kind", "head"): node["resources_total"] for node in nodes}
    offered = {kind: (total.get("CPU", 0), total.get("train_slot", 0)) for kind, total in totals.items()}
    assert offered == {"head": (0, 0), "gpu": (1, 2), "spot": (8, 4)}
    assert [node["labels"].get("kind", "head") for node in left] == ["head"]
    assert len(settings) >= 4  # of the head twice
    for setting in settings:
        assert {name: setting.get(name) for name in SETTINGS} == SETTINGS
    assert metadata.tokens == metadata.asked  # each question had a token of its own


def override(kind: dict[str, Any]) -> dict[str, str]:
    """As `ray.autoscaler._private.updater.NodeUpdater` puts it before the start commands."""
    return {
        "RAY_OVERRIDE_RESOURCES": json.dumps(kind["resources"]),
        "RAY_OVERRIDE_LABELS": json.dumps(kind.get("labels", {})),
    }


class Metadata(ThreadingHTTPServer):
    """The part of AWS' metadata service, version 2, that tells of a spot machine's end."""

    ends: datetime | None = None
    tokens, asked = 0, 0


class MetadataHandler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        assert self.path == "/api/token"
        self.server.tokens += 1
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        assert self.path == "/meta-data/spot/instance-action"
        self.server.asked += 1
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            self._answer(401, "")
        elif self.server.ends is None:
            self._answer(404, "")
        else:
            notice = {"action": "terminate", "time": self.server.ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
            self._answer(200, json.dumps(notice))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def metadata_service() -> Iterator[Metadata]:
    with Metadata(("127.0.0.1", 0), MetadataHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def raylet_environments(mark: str) -> list[dict[str, str]]:
    raylets = [pid for pid in marked(CLUSTER_MARK, mark) if Path(f"/proc/{pid}/exe").resolve().name == "raylet"]
    texts = [Path(f"/proc/{pid}/environ").read_text(encoding="utf-8") for pid in raylets]
    return [dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry) for text in texts]
