"""Requests a second and their times: ours fused and split, bare FastAPI + torch, BentoML; one machine, one generator.

The services take turns, in rounds, so that a slow minute of the machine meets all of them; shown are medians.

python -m benchmarks.serving [--quick] [--json FILE] [--peers-python PATH]; data: MovieLens-100K, fetched at first.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.loadgen import Plan
from benchmarks.peers.environment import peers_python
from benchmarks.result import Check, publish
from benchmarks.scene import Scene, ceiling_per_s, child, load, make_scene, registry_command
from elasticrec.cli.local_cluster import LocalClusterConfig, free_port, local_cluster
from elasticrec.cli.service import deploy

REPLICAS = 2
EVENTS = 400
ROOT = Path(__file__).parents[1]


@contextmanager
def ours(scene: Scene, topology: str, replicas: int) -> Iterator[tuple[int, dict[str, str]]]:
    """With keys, events, and half of the users on another version."""
    gateways = replicas if topology == "split" else 1
    config = LocalClusterConfig(num_cpus=replicas + gateways + 1, train_slots=0, haproxy=True)
    with local_cluster(config) as cluster:
        arguments = scene.arguments(topology=topology, replicas=replicas, gateways=gateways, timeout_ms=10_000)
        deploy(cluster, arguments)
        done = registry_command(cluster, scene, "canary", "--version", "2", "--percent", "50")
        assert done.returncode == 0, done.stderr
        yield cluster.http_port, scene.headers
    scene.registry.set_label("films", "canary", "2", percent=0)


@contextmanager
def bare(scene: Scene, workers: int) -> Iterator[tuple[int, dict[str, str]]]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.bare_serving:app", "--port", str(port)]
    command += ["--workers", str(workers), "--log-level", "warning"]
    log = scene.folder / f"bare-{workers}.log"
    with child(command, _environment(scene), log, f"http://127.0.0.1:{port}/readyz"):
        yield port, {}


@contextmanager
def bento(scene: Scene, python: str, workers: int) -> Iterator[tuple[int, dict[str, str]]]:
    port = free_port()
    command = [python, "-m", "bentoml", "serve", "benchmarks.peers.bento_service:Recommender"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    env = _environment(scene) | {"WORKERS": str(workers), "BENTOML_DO_NOT_TRACK": "1"}
    env["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    with child(command, env, scene.folder / "bento.log", f"http://127.0.0.1:{port}/readyz"):
        yield port, {}


def _environment(scene: Scene) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    return {"BUNDLE": str(scene.folder / "bundle-1"), "DATA": str(scene.data), "PYTHONPATH": path}


def measure(name: str, at: tuple[int, dict[str, str]], seconds: float, bodies: list[str]) -> dict[str, Any]:
    """One connection, then sixty-four."""
    port, headers = at
    row: dict[str, Any] = {"service": name}
    for connections in (1, 64):
        plan = Plan(port=port, connections=connections, seconds=seconds, warm_s=2, bodies=bodies, headers=headers)
        found = load(plan)
        assert not found["failed"], found["failures"]
        refused = sum(count for status, count in found["statuses"].items() if status != "200")
        row |= {f"c={connections} req/s": found["per_s"], f"c={connections} p50 ms": found["p50_ms"]}
        row |= {f"c={connections} p99 ms": found["p99_ms"], f"c={connections} degraded": found["degraded"] + refused}
    print(row, file=sys.stderr, flush=True)
    return row


def freshness(at: tuple[int, dict[str, str]], bodies: list[str], events: int) -> dict[str, Any]:
    """Events, one after the other: from sending one until it is acknowledged, when the next answer has it."""
    port, headers = at
    took_ms, missing = [], 0
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=30, trust_env=False) as http:
        for place in range(events):
            user, item = json.loads(bodies[place % len(bodies)])["user_id"], str(1 + place % 1_000)
            event = {"user_id": user, "item_id": item, "event_id": f"fresh-{time.time_ns()}"}
            started_s = time.perf_counter()
            http.post("/v1/events", json={"events": [event]}).raise_for_status()
            took_ms.append(1e3 * (time.perf_counter() - started_s))
            kept = http.get(f"/v1/users/{user}", params={"limit": 1}).raise_for_status().json()["events"]
            missing += kept[-1]["item_id"] != item
    return {"event visible p99 ms": float(np.percentile(took_ms, 99)), "acknowledged, not visible": missing}


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    of = {row["service"]: row for row in rows}
    fused, plain = of[f"ours fused x{REPLICAS}"], of[f"bare FastAPI x{REPLICAS}"]
    found = []
    peer = of.get(f"BentoML x{REPLICAS}")
    if peer is not None:
        ratio, late = fused["c=64 req/s"] / peer["c=64 req/s"], fused["c=64 p99 ms"] / peer["c=64 p99 ms"]
        found += [
            Check(name="≥ 1.3× BentoML's throughput at 64", value=ratio, target=1.3, unit="times", holds=ratio >= 1.3),
            Check(name="≤ half BentoML's p99 at 64", value=late, target=0.5, unit="times", holds=late <= 0.5),
        ]
    ratio, lone_ms = fused["c=64 req/s"] / plain["c=64 req/s"], fused["c=1 p50 ms"]
    name = "≥ 0.8× bare FastAPI's throughput with as many replicas"
    late_ms, missing = fused["event visible p99 ms"], fused["acknowledged, not visible"]
    return [
        *found,
        Check(name="event visible ≤ 10 ms p99", value=late_ms, target=10, unit="ms", holds=late_ms <= 10),
        Check(name="acknowledged events that the next answer lacks", value=missing, target=0, unit="events",
              holds=missing == 0),
        Check(name=name, value=ratio, target=0.8, unit="times", holds=ratio >= 0.8),
        Check(name="p50 at one connection ≤ 2.5 ms", value=lone_ms, target=2.5, unit="ms", holds=lone_ms <= 2.5),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers-python", help="an interpreter that has benchmarks/peers/serving.txt")
    parser.add_argument("--no-peers", action="store_true", help="leave BentoML out")
    chosen = parser.parse_args()
    seconds, rounds = (4.0, 1) if chosen.quick else (8.0, 3)
    with tempfile.TemporaryDirectory(prefix="er-serving-") as scratch:
        scene = make_scene(Path(scratch))
        python = None if chosen.no_peers else _python(chosen.peers_python)
        rows = medians([row for _ in range(rounds) for row in one_round(scene, seconds, python)])
    rows[0]["generator's ceiling req/s"] = ceiling_per_s(64, 4)
    publish("serving", rows, checks(rows), chosen.json)


def _python(given: str | None) -> str:
    cache = Path(os.environ.get("ELASTICREC_CACHE") or "~/.cache/elasticrec").expanduser()
    return given or peers_python(cache, "serving.txt")


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a service: the median of each figure over the rounds."""
    found = []
    for name in dict.fromkeys(row["service"] for row in rows):
        of = [row for row in rows if row["service"] == name]
        figures = {key: statistics.median(row[key] for row in of) for key in of[0] if key != "service"}
        found.append({"service": name} | figures | {"generator's ceiling req/s": 0.0})
    return found


def one_round(scene: Scene, seconds: float, python: str | None) -> list[dict[str, Any]]:
    rows = []
    for topology in ("fused", "split"):
        with ours(scene, topology, REPLICAS if topology == "fused" else 1) as at:
            name = f"ours {topology} x{REPLICAS}" if topology == "fused" else "ours split 1+1"
            rows.append(measure(name, at, seconds, scene.bodies) | freshness(at, scene.bodies, EVENTS))
    for workers in (1, REPLICAS):
        with bare(scene, workers) as at:
            rows.append(measure(f"bare FastAPI x{workers}", at, seconds, scene.bodies))
    if python is not None:
        wrapped = [f'{{"asks": [{body}]}}' for body in scene.bodies]
        with bento(scene, python, REPLICAS) as at:
            rows.append(measure(f"BentoML x{REPLICAS}", at, seconds, wrapped))
    return rows


if __name__ == "__main__":
    main()
