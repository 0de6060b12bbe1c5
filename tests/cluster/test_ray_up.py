"""`ray up cluster.yaml` as on machines of one's own: over ssh, in a network, with processes and homes apart."""

import contextlib
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from elasticrec.cli.local_cluster import free_port
from tests.cluster.machines import Machine, can_be_made, machines
from tests.cluster.nodes import wait_for_nodes

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
WHERE = "import ray; ray.init(); at = ray.util.get_node_ip_address; "
WHERE += "print('at', ray.get(ray.remote(resources={'train_slot': 1})(lambda: at()).remote()))"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_be_made(), reason="needs root, for networks of its own, and sshd, ssh, rsync, ip"),
]


@pytest.fixture
def site() -> Iterator[tuple[Path, dict[str, str], list[Machine]]]:
    """A folder with the configuration, the environment of whoever has it, and machines for a head and a worker.

    Both machines see the project where it is here, as a shared folder; they have no network to install from.
    """
    shared = {"ELASTICREC_HOME": str(ROOT), "RAY_OPTIONS": "--object-store-memory=200000000"}
    shared["AUTOSCALER_UPDATE_INTERVAL_S"] = "1"
    worker = {**shared, "NODE_KIND": "spot", "RAY_OPTIONS": f"{shared['RAY_OPTIONS']} --num-cpus=1"}
    worker["RAY_gcs_rpc_server_reconnect_timeout_s"] = "5"  # by default a worker outlives its head by a minute
    place = tempfile.TemporaryDirectory(prefix="ru-", dir="/tmp", ignore_cleanup_errors=True)
    with place as name, machines(Path(name), [shared, worker]) as both:
        folder = Path(name)
        config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
        config["cluster_name"] = folder.name
        config["provider"] |= {"head_ip": both[0].address, "worker_ips": [both[1].address]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
        config |= {"min_workers": 1, "max_workers": 1}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        token = secrets.token_hex(32)
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text(token)
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        try:
            yield folder, {**env, "HOME": str(folder), "TMPDIR": str(folder), "RAY_AUTH_MODE": "token"}, both
        finally:
            for left in Path("/tmp/ray").glob(f"cluster-{folder.name}.*"):
                left.unlink()
            sockets = hashlib.sha256(folder.name.encode()).hexdigest()[:10]  # of ssh, as Ray names their folder
            for left in Path("/tmp").glob(f"ray_ssh_*/{sockets}"):
                shutil.rmtree(left, ignore_errors=True)


def ray(env: dict[str, str], *words: str) -> str:
    done = subprocess.run([RAY, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, f"ray {' '.join(words)}\n{done.stdout[-5_000:]}{done.stderr[-3_000:]}"
    return done.stdout + done.stderr


@contextlib.contextmanager
def forwarded(config: str, env: dict[str, str], log: Path) -> Iterator[str]:
    """`ray dashboard`, until the block ends; the address here."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [RAY, "dashboard", config, "--port", str(port)],
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # and its ssh
        process.wait(timeout=30)


def test_ray_up_makes_a_cluster_that_takes_jobs_and_ray_down_ends_it(
    site: tuple[Path, dict[str, str], list[Machine]],
) -> None:
    folder, env, (head, worker) = site
    config = str(folder / "cluster.yaml")
    ray(env, "up", "-y", config)
    assert (head.home / "elasticrec" / "pyproject.toml").is_file()
    with forwarded(config, env, folder / "dashboard.log") as dashboard:
        token = (folder / ".ray" / "auth_token").read_text()
        logs = [folder / "dashboard.log", *head.home.glob("ray/*/logs/monitor.*")]
        nodes = wait_for_nodes(2, dashboard, token, logs, within_s=240)
        offered = {node["node_ip"]: node["resources_total"] for node in nodes}
        assert (offered[head.address].get("CPU", 0), offered[head.address].get("train_slot", 0)) == (0, 0)
        assert (offered[worker.address]["CPU"], offered[worker.address]["train_slot"]) == (1, 1)
        assert [node["labels"].get("kind") for node in nodes if node["node_ip"] == worker.address] == ["spot"]
        told = ray(env, "job", "submit", "--address", dashboard, "--working-dir", ".", "--", "python", "-c", WHERE)
        assert f"at {worker.address}" in told
    said = ray(env, "down", "-y", config)
    deadline_s = time.monotonic() + 90
    while running := [
        name for machine in (head, worker) for name in machine.programs() if name in ("raylet", "gcs_server")
    ]:
        assert time.monotonic() < deadline_s, f"{running}\n{said}"
        time.sleep(0.2)
