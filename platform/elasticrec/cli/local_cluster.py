"""Sizes in, a private Ray cluster out: child processes of this one, on free ports, gone without a trace at the end.

Other Ray clusters of the machine are neither seen nor touched: `ray stop` is never called. What belongs to the cluster
is found by a mark in its environment, which even orphans (haproxy) inherit.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import httpx

from elasticrec.cli.web import connect, get
from elasticrec.errors import ElasticRecError

CLUSTER_MARK = "ELASTICREC_LOCAL_CLUSTER"
NODE_MARK = "ELASTICREC_LOCAL_NODE"
_HEAD_TEMP_DIR = "ELASTICREC_LOCAL_TEMP_DIR"
_OUTLIVES_PARENT = "ELASTICREC_LOCAL_KEEP"

# Above Ray's ports by default, below the ephemeral ports of Linux (32768-60999), which any client may hold.
FIRST_PORT, LAST_PORT = 20_000, 29_999
REPLICA_PORTS = 100
# A unix socket's path ends at 107 bytes; Ray appends about 65 to its temp dir, haproxy about 80.
MAX_TEMP_DIR_BYTES = 24

PR_SET_PDEATHSIG = 1  # prctl(2): the kernel signals the child when the thread that started it dies
_CHILD = "from elasticrec.cli.local_cluster import child; child()"


class LocalClusterError(ElasticRecError, RuntimeError):
    """A local Ray cluster does not start or a node of it does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalClusterConfig:
    """Sizes of the head node, and how long to wait for it.

    `auth="token"` guards the cluster by a fresh token in `LocalCluster.env`. Ray listens on every interface of the
    machine, so "disabled" suits tests and machines that nobody else reaches. `keep` leaves the cluster running when
    the `with` block ends without an error; SIGTERM to `LocalCluster.pid` then ends it as completely.
    """

    num_cpus: int = 2
    train_slots: int = 2
    haproxy: bool = False
    keep: bool = False
    auth: Literal["disabled", "token"] = "disabled"
    object_store_bytes: int = 512 * 2**20
    metrics_s: float = 10.0  # between two reports of each process
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 20.0
    attempts: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalNode:
    """A worker raylet that `LocalCluster.add_node` started."""

    name: str
    node_id: str
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCluster:
    """A running cluster. `env` is the whole environment for drivers, `ray job submit` and `serve run`."""

    address: str
    dashboard_url: str
    http_port: int
    env: dict[str, str] = field(repr=False)
    temp_dir: Path
    pid: int
    config: LocalClusterConfig = field(repr=False)
    mark: str = field(repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the dashboard must carry."""
        token = self.env.get("RAY_AUTH_TOKEN")
        return {"Authorization": f"Bearer {token}"} if token else {}

    def nodes(self) -> list[dict[str, Any]]:
        """Every node that is alive, as the state API tells it (`node_id`, `node_name`, `resources_total`, ...)."""
        answer = self._get("/api/v0/nodes?detail=1&limit=1000").json()
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def add_node(self, num_cpus: int = 1, train_slots: int = 1, labels: Mapping[str, str] | None = None) -> LocalNode:
        """Starts one more raylet and waits until the cluster counts it. Call from a thread that outlives the node.

        Raises:
            LocalClusterError: it ended or did not join in time; the end of its log is shown.
        """
        name = f"node-{secrets.token_hex(4)}"
        env = {**self.env, **_node_ports(), CLUSTER_MARK: self.mark, NODE_MARK: name}
        arguments = ["--address", self.address, "--node-name", name]
        arguments += _size_arguments(self.config, num_cpus, train_slots)
        arguments += ["--labels", ",".join(f"{key}={value}" for key, value in labels.items())] if labels else []
        log = self.temp_dir / f"{name}.log"
        process = _spawn(arguments, env, log)
        try:
            node = _wait_for(lambda: self._named(name), process, log, self.config.start_timeout_s)
        except BaseException:
            kill_marked(NODE_MARK, name)
            raise
        return LocalNode(name=name, node_id=node["node_id"], process=process)

    def remove_node(self, node: LocalNode) -> None:
        """Ends the node as a power cut would: SIGKILL to everything that runs on it, no notice."""
        kill_marked(NODE_MARK, node.name)
        node.process.wait(timeout=10)

    def processes(self) -> list[int]:
        """Ids of all processes that belong to the cluster, jobs and haproxy included; drivers are not among them."""
        return marked(CLUSTER_MARK, self.mark)

    def _named(self, name: str) -> dict[str, Any] | None:
        return next((node for node in self.nodes() if node["node_name"] == name), None)

    def _get(self, path: str) -> httpx.Response:
        return get(self.dashboard_url + path, headers=self.headers)


@contextlib.contextmanager
def local_cluster(config: LocalClusterConfig | None = None) -> Iterator[LocalCluster]:
    """Starts a cluster, yields it, and ends it with all that runs on it: serve first, then Ray, then what is left.

    Raises:
        LocalClusterError: it did not start after `config.attempts` tries; the end of its log is shown.
    """
    config = config or LocalClusterConfig()
    cluster, process = _start(config)
    try:
        yield cluster
    except BaseException:
        _stop(cluster, process)
        raise
    if not config.keep:
        _stop(cluster, process)


def child() -> None:
    """The child's own main: `ray start`, ended when the parent dies; the head also removes what the cluster leaves."""
    if sys.platform == "linux" and _OUTLIVES_PARENT not in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    temp_dir = os.environ.pop(_HEAD_TEMP_DIR, None)
    if temp_dir:  # registered before Ray's own handlers, hence run after them
        atexit.register(shutil.rmtree, temp_dir, ignore_errors=True)
        atexit.register(kill_marked, CLUSTER_MARK, os.environ[CLUSTER_MARK])
    importlib.import_module("ray.scripts.scripts").main()


def free_port() -> int:
    """A port of 20000-29999 on which nothing listens now; the caller binds it later, so a clash stays possible."""
    return _free_block(1)


def _start(config: LocalClusterConfig) -> tuple[LocalCluster, subprocess.Popen[bytes]]:
    for attempt in range(1, config.attempts + 1):
        try:
            return _start_once(config)
        except LocalClusterError:  # most often a port that was taken between its choice and Ray's bind
            if attempt == config.attempts:
                raise
    raise LocalClusterError(f"attempts is {config.attempts}; it must be at least 1")


def _start_once(config: LocalClusterConfig) -> tuple[LocalCluster, subprocess.Popen[bytes]]:
    gcs_port, dashboard_port, client_port, http_port = (free_port() for _ in range(4))
    temp_dir = _short_temp_dir()
    mark = f"{temp_dir.name}-{secrets.token_hex(8)}"
    env = _environment(config, f"127.0.0.1:{gcs_port}", f"http://127.0.0.1:{dashboard_port}", temp_dir)
    arguments = ["--head", "--port", str(gcs_port), "--temp-dir", str(temp_dir), "--disable-usage-stats"]
    arguments += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)]
    arguments += ["--ray-client-server-port", str(client_port)]
    arguments += _size_arguments(config, config.num_cpus, config.train_slots)
    process = _spawn(arguments, env | _head_environment(config, mark, temp_dir), temp_dir / "head.log")
    cluster = LocalCluster(
        address=env["RAY_ADDRESS"],
        dashboard_url=env["RAY_API_SERVER_ADDRESS"],
        http_port=http_port,
        env=env,
        temp_dir=temp_dir,
        pid=process.pid,
        config=config,
        mark=mark,
    )
    try:
        _wait_for(cluster.nodes, process, temp_dir / "head.log", config.start_timeout_s)
    except BaseException:
        kill_marked(CLUSTER_MARK, mark)
        process.wait(timeout=10)
        shutil.rmtree(temp_dir, ignore_errors=True)
        raise
    return cluster, process


def _head_environment(config: LocalClusterConfig, mark: str, temp_dir: Path) -> dict[str, str]:
    keep = {_OUTLIVES_PARENT: "1"} if config.keep else {}
    return {CLUSTER_MARK: mark, _HEAD_TEMP_DIR: str(temp_dir), **keep}


def _environment(config: LocalClusterConfig, address: str, dashboard_url: str, temp_dir: Path) -> dict[str, str]:
    foreign = ("RAY_", "SERVE_", "ELASTICREC_LOCAL_")  # settings of another cluster must not leak into this one
    env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    haproxy_dir = temp_dir / "h"  # Ray puts <node id>/ below it
    env |= {
        # the `python` of a job's command line is this one
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
        "RAY_ADDRESS": address,
        "RAY_API_SERVER_ADDRESS": dashboard_url,
        "RAY_DASHBOARD_ADDRESS": dashboard_url,
        "RAY_AUTH_MODE": config.auth,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_worker_niceness": "0",  # by default 15: replicas would wait for whatever else the machine does
        "RAY_prestart_worker_first_driver": "0",  # as many processes as CPUs, most of which nobody ever uses
        "RAY_metrics_report_interval_ms": str(round(1e3 * config.metrics_s)),
        "RAY_health_check_period_ms": "1000",  # a killed node counts as dead after 5 refused checks: 5 s, not 15
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(config.haproxy)),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # what a dying replica held goes to another one
        "RAY_SERVE_HAPROXY_BROADCAST_COALESCE_S": "1",  # seconds; one that is told of a version is away for a moment
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # what blocks is in threads of ours; a fifth less CPU
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy hears of it within a good second
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy_dir / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy_dir / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy_dir / "server-state"),
    }
    if config.auth == "token":
        env["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return env | _node_ports()


def _node_ports() -> dict[str, str]:
    """The ports of Serve that every node of one machine needs for itself."""
    names = ("HAPROXY_STATS_PORT", "HAPROXY_METRICS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")
    ports = {f"RAY_SERVE_{name}": str(free_port()) for name in (*names, "WORKER_PROXY_HTTP_PORT")}
    for protocol in ("HTTP", "GRPC"):
        first = _free_block(REPLICA_PORTS)
        ports[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(first)
        ports[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(first + REPLICA_PORTS - 1)
    return ports


def _size_arguments(config: LocalClusterConfig, num_cpus: int, train_slots: int) -> list[str]:
    arguments = ["--node-ip-address", "127.0.0.1", "--num-cpus", str(num_cpus)]
    arguments += ["--resources", json.dumps({"train_slot": train_slots}) if train_slots else "{}"]
    arguments += ["--object-store-memory", str(config.object_store_bytes)]
    # 0: whatever is free when Ray binds it. Nobody needs to know these.
    for port in ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export"):
        arguments += [f"--{port}-port", "0"]
    return [*arguments, "--min-worker-port", "0", "--max-worker-port", "0"]


def _spawn(arguments: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD, "start", "--block", *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone; we end the cluster in order
        )


def _wait_for(ready: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> Any:
    deadline_s = time.monotonic() + timeout_s
    with log.open("rb") as lines:  # opened now, since a head that fails removes its files
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise LocalClusterError(f"'ray start' ended with status {process.returncode}; {_end_of(lines)}")
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
                if answer := ready():
                    return answer
            time.sleep(0.1)
        raise LocalClusterError(f"Ray did not start within {timeout_s:g} s; {_end_of(lines)}")


def _end_of(log: BinaryIO, lines: int = 20) -> str:
    return "its log ends:\n" + "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])


def _stop(cluster: LocalCluster, process: subprocess.Popen[bytes]) -> None:
    try:
        _stop_serve(cluster)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=cluster.config.stop_timeout_s)
    finally:  # also on Ctrl-C during an orderly stop
        kill_marked(CLUSTER_MARK, cluster.mark)
        process.wait(timeout=10)
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)


def _stop_serve(cluster: LocalCluster) -> None:
    """`serve.shutdown()` through the REST API: it returns when the applications and their proxies are gone."""
    if not _is_serving(cluster):
        return
    patient = connect(headers=cluster.headers, timeout=cluster.config.stop_timeout_s)
    with contextlib.suppress(httpx.HTTPError), patient as client:
        client.delete(f"{cluster.dashboard_url}/api/serve/applications/")


def _is_serving(cluster: LocalCluster) -> bool:
    """Whether Serve's controller runs. Asked first, since the DELETE alone would start a driver (seconds)."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        filters = "filter_keys=state&filter_predicates=%3D&filter_values=ALIVE&limit=10000"
        actors = cluster._get(f"/api/v0/actors?{filters}").json()["data"]["result"]["result"]
        return any(actor["class_name"] == "ServeController" for actor in actors)
    return False


def kill_marked(key: str, value: str, timeout_s: float = 10.0) -> None:
    """SIGKILL to every process with the mark, again until none is left: a dying parent may have forked meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while (pids := marked(key, value)) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(key: str, value: str) -> list[int]:
    """Ids of the live processes whose environment holds `key=value`. Zombies have none, so they are not counted."""
    mark = f"{key}={value}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
    return pids


def _short_temp_dir() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="er-", dir=parent if len(parent) < MAX_TEMP_DIR_BYTES - 12 else "/tmp"))


def _free_block(size: int) -> int:
    """The first of `size` ports next to each other; the first and the last are free now."""
    for _ in range(1000):
        first = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT - size + 2)
        if _is_free(first) and _is_free(first + size - 1):
            return first
    raise LocalClusterError(f"found no free port in {FIRST_PORT}-{LAST_PORT}; end what holds them")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
