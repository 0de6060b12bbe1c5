"""A private cluster starts, works, grows, shrinks, and leaves neither a process nor a port nor a file behind."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from elasticrec.cli.local_cluster import CLUSTER_MARK, LocalClusterConfig, LocalClusterError, free_port, local_cluster

TASK = "import ray; ray.init(); print('answer', ray.get(ray.remote(lambda: 42).remote()))"
SERVE = """
from ray import serve
serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
class Hello:
    async def __call__(self, request):
        return "hello"
serve.run(serve.deployment(num_replicas=1, ray_actor_options={{"num_cpus": 0.1}})(Hello).bind())
"""


def run_driver(code: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition not met in time"
        time.sleep(0.2)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cluster_works_grows_shrinks_and_leaves_nothing_behind() -> None:
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=2, haproxy=True, auth="token")) as cluster:
        ports = [int(cluster.address.rpartition(":")[2]), int(cluster.dashboard_url.rpartition(":")[2])]
        assert "answer 42" in run_driver(TASK, cluster.env)
        assert httpx.get(f"{cluster.dashboard_url}/api/v0/nodes").status_code == 401  # the token guards it

        node = cluster.add_node(num_cpus=1, train_slots=1)
        slots = {entry["node_id"]: entry["resources_total"].get("train_slot") for entry in cluster.nodes()}
        assert sorted(slots.values()) == [1.0, 2.0]
        assert slots[node.node_id] == 1.0
        cluster.remove_node(node)
        assert not is_alive(node.pid)
        wait_until(lambda: len(cluster.nodes()) == 1)

        run_driver(SERVE.format(port=cluster.http_port), cluster.env)
        assert httpx.get(f"http://127.0.0.1:{cluster.http_port}/").text == "hello"
        pids = cluster.processes()
        names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
        assert any(b"haproxy" in name.split(b"\0")[0] for name in names), names
        ports += [cluster.http_port, int(cluster.env["RAY_SERVE_HAPROXY_STATS_PORT"])]
        assert all(map(listens, ports)), ports

    assert [pid for pid in pids if is_alive(pid)] == []
    assert cluster.processes() == []
    assert [port for port in ports if listens(port)] == []
    assert not cluster.temp_dir.exists()


PARENT = """
import os, signal
from elasticrec.cli.local_cluster import CLUSTER_MARK, LocalClusterConfig, local_cluster
with local_cluster(LocalClusterConfig(num_cpus=1, keep={keep})) as cluster:
    print(cluster.pid, cluster.temp_dir, *cluster.processes(), flush=True)
    if not {keep}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("keep", [False, True], ids=["parent_killed", "kept_then_terminated"])
def test_cluster_ends_without_its_parent(keep: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(keep=keep)], stdout=subprocess.PIPE, text=True
    ) as parent:
        words = parent.communicate(timeout=90)[0].split()
    temp_dir, pids = Path(words[1]), [int(word) for word in words[2:]]
    assert len(pids) > 3
    if keep:
        assert is_alive(int(words[0]))
        os.kill(int(words[0]), signal.SIGTERM)
    wait_until(lambda: not any(map(is_alive, pids)) and not temp_dir.exists())


def test_failed_start_shows_the_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as parent:
        monkeypatch.setattr("tempfile.tempdir", parent)
        with (
            pytest.raises(LocalClusterError, match=r"(?s)'ray start' ended with status [1-9]\d*; its log ends:.*\S"),
            local_cluster(LocalClusterConfig(object_store_bytes=1, attempts=1)),
        ):
            raise AssertionError("a cluster without an object store must not start")
        assert list(Path(parent).iterdir()) == []


def test_settings_of_another_cluster_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    with local_cluster(LocalClusterConfig(num_cpus=1, train_slots=0)) as cluster:
        assert cluster.env["RAY_ADDRESS"] == cluster.address != "127.0.0.1:1"
        assert "RAY_SERVE_THROUGHPUT_OPTIMIZED" not in cluster.env
        assert CLUSTER_MARK not in cluster.env  # drivers are not the cluster's to kill
        assert "train_slot" not in cluster.nodes()[0]["resources_total"]


def test_free_port_is_outside_the_ephemeral_range() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 1
    assert all(20_000 <= port < 30_000 for port in ports)
