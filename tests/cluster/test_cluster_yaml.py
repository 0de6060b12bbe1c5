"""cluster.yaml is what `ray up` accepts, and its start commands make a cluster, run here for real."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from elasticrec.cli.local_cluster import CLUSTER_MARK, free_port, kill_marked, marked

ROOT = Path(__file__).parents[2]
ZERO_PORTS = "--dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 --runtime-env-agent-port=0"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    assert isinstance(loaded, dict)
    return loaded


def test_ray_accepts_it_and_rejects_a_misspelt_key(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="worker_start_command"):
        validate_config(prepare_config(config | {"worker_start_command": []}))


def test_start_commands_never_stop_what_runs(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("ray stop" not in command for command in prepared[key])


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


def alive_nodes(dashboard: str, token: str) -> list[dict[str, Any]]:
    url = f"{dashboard}/api/v0/nodes?detail=1"
    with contextlib.suppress(httpx.HTTPError, ValueError):
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        if answer.status_code == 200:
            return [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
    return []


def wait_for_nodes(count: int, dashboard: str, token: str, logs: list[Path]) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + 90
    while len(nodes := alive_nodes(dashboard, token)) != count:
        assert time.monotonic() < deadline_s, "\n".join(log.read_text(encoding="utf-8") for log in logs)
        time.sleep(0.2)
    return nodes


def test_start_commands_make_a_cluster_of_two_nodes(config: dict[str, Any]) -> None:
    (head_command,), (worker_command,) = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    port, dashboard_port, mark, token = free_port(), free_port(), secrets.token_hex(8), secrets.token_hex(32)
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    with tempfile.TemporaryDirectory(prefix="cy-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = f"--block --num-cpus=1 --object-store-memory=200000000 --metrics-export-port=0 {ZERO_PORTS}"
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"HOME": folder, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", CLUSTER_MARK: mark}
        env |= {"RAY_AUTH_TOKEN": token, "RAY_PORT": str(port), "RAY_HEAD_IP": "127.0.0.1"}
        env |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
        own = f"--temp-dir={folder} --dashboard-port={dashboard_port} --ray-client-server-port={free_port()}"
        head_env = env | {"RAY_OPTIONS": f"{options} {own}", "TRAIN_SLOTS": "2"}
        worker_env = env | {"RAY_OPTIONS": options}
        logs = [Path(folder) / "head.log", Path(folder) / "worker.log"]
        try:
            with started(head_command, head_env, logs[0]):
                wait_for_nodes(1, dashboard, token, logs)
                with started(worker_command, worker_env, logs[1]):
                    nodes = wait_for_nodes(2, dashboard, token, logs)
                    settings = raylet_environments(mark)
        finally:
            kill_marked(CLUSTER_MARK, mark)
    assert sorted(node["resources_total"]["train_slot"] for node in nodes) == [1.0, 2.0]
    assert [node["resources_total"]["CPU"] for node in nodes] == [1.0, 1.0]
    assert len(settings) == 2
    for setting in settings:  # what Serve and Train read on every node
        assert setting["RAY_AUTH_MODE"] == "token"
        assert setting["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert setting["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "10"
        assert setting["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "1"
    assert marked(CLUSTER_MARK, mark) == []


def raylet_environments(mark: str) -> list[dict[str, str]]:
    raylets = [pid for pid in marked(CLUSTER_MARK, mark) if Path(f"/proc/{pid}/exe").resolve().name == "raylet"]
    texts = [Path(f"/proc/{pid}/environ").read_text(encoding="utf-8") for pid in raylets]
    return [dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry) for text in texts]
