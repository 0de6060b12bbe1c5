"""What goes wrong, under constant load, in; failed requests, lost events and the slope of memory out.

python -m benchmarks.faults [--quick] [--json FILE]; needs redis-server; data: MovieLens-100K, fetched at first.

Two fused replicas behind HAProxy, with keys; events in Redis. A paced load comes from a process of its own; every tenth
request is an event, and each acknowledged one is looked for afterwards. A request whose connection ends is sent once
more: the one retry that "failed" allows.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import redis

from benchmarks.loadgen import Plan
from benchmarks.result import Check, options, publish
from benchmarks.scene import Scene, load, loading, make_scene, pids_of, registry_command, wait_running
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.service import deploy

CONNECTIONS, PACE_S = 16, 0.08  # 200 requests a second
IN_FLIGHT = 96  # of a replica
TIMEOUT_MS = 2_000
SHOWN = 1_000


class Redis:
    """A server that keeps what it acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"unix://{folder}/redis.sock?db=0"
        self.start()

    def start(self) -> None:
        settings = ["--port", "0", "--unixsocket", f"{self._folder}/redis.sock", "--dir", str(self._folder)]
        settings += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self._process = subprocess.Popen(["redis-server", *settings], stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            for _ in range(500):
                with contextlib.suppress(redis.RedisError):
                    client.ping()
                    return
                time.sleep(0.02)
        raise RuntimeError("redis-server does not start")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Site:
    """The service that things happen to."""

    def __init__(self, cluster: LocalCluster, scene: Scene, store: Redis) -> None:
        self.cluster, self.scene, self.store = cluster, scene, store
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{cluster.http_port}", headers=scene.headers, timeout=30, trust_env=False
        )

    def kill(self, class_name: str) -> None:
        """SIGKILL to one actor of that class."""
        os.kill(self.pids(class_name)[0], signal.SIGKILL)

    def pids(self, class_name: str) -> list[int]:
        return pids_of(self.cluster, class_name)

    def scale(self, replicas: int) -> None:
        with httpx.Client(base_url=self.cluster.dashboard_url, timeout=60, trust_env=False) as api:
            details = api.get("/api/serve/applications/").json()
            config = details["applications"]["recommender"]["deployed_app_config"]
            told = {entry["name"]: entry for entry in config.get("deployments") or []}
            told["FusedReplica"] = told.get("FusedReplica", {"name": "FusedReplica"}) | {"num_replicas": replicas}
            config["deployments"] = list(told.values())
            http = {"host": "127.0.0.1", "port": self.cluster.http_port}
            api.put(
                "/api/serve/applications/", json={"http_options": http, "applications": [config]}
            ).raise_for_status()
        self.wait(replicas)

    def wait(self, replicas: int) -> None:
        wait_running(self.cluster, replicas)

    def restart_store(self) -> None:
        self.store.kill()
        self.store.start()

    def promote(self, expected: int, *words: str) -> None:
        done = registry_command(self.cluster, self.scene, *words)
        assert done.returncode == expected, done.stdout + done.stderr

    def lost(self, acknowledged: list[list[str]]) -> int:
        kept: dict[str, set[str]] = {}
        for user, _ in acknowledged:
            if user not in kept:
                events = self._http.get(f"/v1/users/{user}?limit={SHOWN}").raise_for_status().json()["events"]
                kept[user] = {event["item_id"] for event in events}
        return sum(item not in kept[user] for user, item in acknowledged)

    def plan(self, mark: str, seconds: float, **others: Any) -> Plan:
        common: dict[str, Any] = {
            "connections": CONNECTIONS,
            "pace_s": PACE_S,
            "writes": True,
            "headers": self.scene.headers,
        }
        return Plan(port=self.cluster.http_port, seconds=seconds, bodies=self.scene.bodies, mark=mark,
                    **common | others)  # fmt: skip


def happen(site: Site, name: str, action: Callable[[], None], least_s: float) -> dict[str, Any]:
    """The action after two seconds of load, which goes on until it is over and two seconds more."""
    print(f"{name} …", file=sys.stderr, flush=True)
    took_s = 0.0
    # As long as needed is not known before, so the load is cut into pieces that follow one another.
    found: list[dict[str, Any]] = []
    stop = threading.Event()

    def keep_on() -> None:
        number = 0
        while not stop.is_set():
            found.append(load(site.plan(f"{name.replace(' ', '-')}-{number}", least_s)))
            number += 1

    thread = threading.Thread(target=keep_on)
    thread.start()
    try:
        time.sleep(2)
        started_s = time.monotonic()
        action()
        took_s = time.monotonic() - started_s
        time.sleep(2)
    finally:
        stop.set()
        thread.join()
    return _row(site, name, found, took_s)


def _row(site: Site, name: str, found: list[dict[str, Any]], took_s: float) -> dict[str, Any]:
    acknowledged = [pair for part in found for pair in part["acknowledged"]]
    for part in found:
        for failure in part["failures"]:
            print(f"  {failure}", file=sys.stderr, flush=True)
    row = {
        "what": name,
        "requests": sum(part["requests"] for part in found),
        "failed": sum(part["failed"] for part in found),
        "429": sum(part["statuses"].get("429", 0) for part in found),
        "degraded": sum(part["degraded"] for part in found),
        "retried": sum(part["retried"] for part in found),
        "p50 ms": float(np.median([part["p50_ms"] for part in found])),
        "p99 ms": max(part["p99_ms"] for part in found),
        "max ms": max(part["max_ms"] for part in found),
        "acknowledged": len(acknowledged),
        "lost": site.lost(acknowledged),
        "took s": took_s,
    }
    print(row, file=sys.stderr, flush=True)
    return row


def overload(site: Site, seconds: float) -> dict[str, Any]:
    """Three times what it can, by callers that keep their pace."""
    can_per_s = load(site.plan("capacity", 3, connections=64, pace_s=0, writes=False, warm_s=2))["per_s"]
    connections = 8 * IN_FLIGHT
    found = load(site.plan("overload", seconds, connections=connections, pace_s=connections / (3 * can_per_s)))
    offered = {"offered per s": 3 * can_per_s, "sent per s": found["sent"] / seconds}
    return _row(site, "overload at 3x", [found], seconds) | offered


def soak(site: Site, seconds: float) -> tuple[dict[str, Any], float]:
    """The constant load, and how replicas grow meanwhile: MB a minute over the second half, of the worst one.

    A new replica's threads fill their arenas for five minutes, ever more slowly (docs/log.md).
    """
    samples: dict[int, list[tuple[float, float]]] = {}
    with loading(site.plan("soak", seconds)) as generator:
        started_s = time.monotonic()
        pids = site.pids("FusedReplica")
        while time.monotonic() - started_s < seconds:
            for pid in pids:
                samples.setdefault(pid, []).append((time.monotonic() - started_s, _resident_mb(pid)))
            time.sleep(1)
        found = generator.outcome()
    slopes = []
    for series in samples.values():
        at_s, mb = np.array([pair for pair in series if pair[0] > seconds / 2]).T
        slopes.append(60 * float(np.polyfit(at_s, mb, 1)[0]))
    return _row(site, f"soak of {seconds / 60:g} min", [found], seconds), max(slopes)


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def site_of(folder: Path) -> Iterator[Site]:
    scene = make_scene(folder, versions=3)
    bad = Path(scene.registry.resolve("films", "3"), "weights.safetensors")
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    short = Path(tempfile.mkdtemp(prefix="er-redis-", dir="/tmp"))  # a socket's path ends at 107 bytes
    store = Redis(short)
    try:
        with local_cluster(LocalClusterConfig(num_cpus=4, train_slots=0, haproxy=True)) as cluster:
            arguments = scene.arguments(
                events=store.url, replicas=2, max_ongoing_requests=IN_FLIGHT, timeout_ms=TIMEOUT_MS
            )
            deploy(cluster, arguments)
            site = Site(cluster, scene, store)
            site.wait(2)
            yield site
    finally:
        store.kill()
        shutil.rmtree(short)


def run(site: Site, quick: bool) -> tuple[list[dict[str, Any]], float]:
    least_s = 8.0

    def killed() -> None:
        site.kill("FusedReplica")
        time.sleep(3)
        site.wait(2)

    def without_controller() -> None:
        site.kill("ServeController")
        time.sleep(8)
        site.wait(2)

    events: dict[str, Callable[[], None]] = {
        "replica SIGKILL": killed,
        "controller SIGKILL": without_controller,
        "promote": lambda: site.promote(0, "promote", "--version", "2"),
        "rollback": lambda: site.promote(0, "rollback"),
        "bad bundle": lambda: site.promote(2, "promote", "--version", "3"),
        "event-store restart": site.restart_store,
        "scale down": lambda: site.scale(1),
        "scale up": lambda: site.scale(2),
    }
    rows = [happen(site, name, action, least_s) for name, action in events.items()]
    rows.append(overload(site, 6 if quick else 20))
    last, slope = soak(site, 60 if quick else 600)
    return [*rows, last], slope


def checks(rows: list[dict[str, Any]], slope_mb: float) -> list[Check]:
    of = {row["what"]: row for row in rows}
    found = [
        Check(name=f"{row['what']}: failed requests (0 outside the stated retry)", value=row["failed"], target=0,
              unit="requests", holds=row["failed"] == 0)
        for row in rows
    ]  # fmt: skip
    lost, late_ms = sum(row["lost"] for row in rows), of["overload at 3x"]["max ms"]
    limit_ms = 2 * TIMEOUT_MS
    return [
        *found,
        Check(name="lost events 0", value=lost, target=0, unit="events", holds=lost == 0),
        Check(name="overload at 3x: nothing hangs", value=late_ms, target=limit_ms, unit="ms at most",
              holds=late_ms <= limit_ms),
        Check(name="memory is flat over a soak", value=slope_mb, target=1.0, unit="MB a minute", holds=slope_mb <= 1.0),
    ]  # fmt: skip


def main() -> None:
    chosen = options(__doc__ or "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    with tempfile.TemporaryDirectory(prefix="er-faults-") as scratch, site_of(Path(scratch)) as site:
        rows, slope_mb = run(site, chosen.quick)
    for row in rows:
        row.setdefault("offered per s", 1 / PACE_S * CONNECTIONS)
    publish("faults", rows, checks(rows, slope_mb), chosen.json)


if __name__ == "__main__":
    main()
