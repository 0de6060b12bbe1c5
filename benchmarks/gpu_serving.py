"""Replicas that share a GPU behind the serving graph: latency, throughput, each hop; a killed replica and a hot swap.

    python -m benchmarks.gpu_serving --data data/ml-100k --json FILE

`--parts scaled` is for a host of several GPUs: one replica on each, from one to all.

`--data`: ML-100K as `elasticrec data prepare` left it; without it, it is fetched. `--device cpu --quick` is the same
shape without a GPU. After each row the file is written. Requests come from a few processes of `benchmarks.loadgen`.
"""

import argparse
import http.client
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import torch

from benchmarks.loadgen import Plan
from benchmarks.result import Check, keep
from benchmarks.scene import NAME, Scene, load, make_scene, pids_of, promotion, wait_running
from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, free_port, local_cluster
from elasticrec.cli.service import deploy
from elasticrec.data.inputs import Past
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving import gpu
from elasticrec.serving.auth import create_key
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.setup import ModelSetup

BULK_PATH, LINEAR = "/v1/recommend:batch", 0.9
STAGES = ("history", "encode", "retrieve", "rank", "postprocess", "queue", "total")
BULK_TARGET, SPIKE = 100_000, 3.0
WARM_S, BEFORE_S, AFTER_S = 1.0, 2.0, 3.0  # of load around an action; of what comes after it, what still counts as its
COLUMNS = ("what", "replicas", "connections", "req/s", "users/s", "p50 ms", "p99 ms", "max ms", "failed", "degraded",
           "retried", "GPU %", "GPU MiB", "more")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much of everything."""

    replicas: tuple[int, ...] = (1, 2, 4)
    gateways: int = 4
    connections: tuple[int, ...] = (1, 32, 128)
    seconds: float = 2.5
    warm_s: float = 1.0
    generators: int = 4
    hops: int = 300  # requests, one after the other
    bulk_replicas: int = 10
    bulk_users: int = 2_000  # of a request
    together: tuple[int, ...] = (64, 256)  # of them, in the model
    paced: int = 32  # connections while something happens
    pace_s: float = 0.05
    kill_s: float = 22.0  # of load around it
    swap_s: float = 14.0
    swaps: int = 3
    catalogue: int = 1_000_000


QUICK = Size(replicas=(1,), gateways=1, connections=(1, 8), seconds=1.0, warm_s=0.5, generators=1, hops=30,
             bulk_replicas=1, bulk_users=200, together=(32,), paced=4, pace_s=0.1, kill_s=20.0, swap_s=14.0, swaps=2,
             catalogue=20_000)  # fmt: skip


@dataclass(kw_only=True)
class Bench:
    """A cluster, what is served on it, and the rows so far."""

    cluster: LocalCluster
    scene: Scene
    size: Size
    device: str
    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def tell(self, what: str, **values: Any) -> None:
        """A row, kept at once."""
        row = (
            dict.fromkeys(COLUMNS) | {"what": what} | {name.replace("_", " "): value for name, value in values.items()}
        )
        self.rows.append(row)
        keep("gpu_serving", self.rows, self.checks, self.file)
        print({name: _short(value) for name, value in row.items() if value is not None}, file=sys.stderr, flush=True)

    def check(self, name: str, value: float, target: float, unit: str, holds: bool) -> None:
        self.checks.append(Check(name=name, value=value, target=target, unit=unit, holds=holds))
        keep("gpu_serving", self.rows, self.checks, self.file)

    @contextmanager
    def serving(self, replicas: int, topology: str = "fused", *, own: bool = False, **others: Any) -> Iterator[int]:
        """The graph with replicas that share a GPU, or have an `own` one each; nothing of it is left at the end."""
        arguments = self.scene.arguments(topology=topology, replicas=replicas, timeout_ms=10_000, **others)
        if topology == "split":
            arguments["gateways"] = self.size.gateways
        if self.device == "cuda":
            arguments["num_gpus"] = 1.0 if own else 10_000 // replicas / 10_000  # Ray counts so fine
        started_s = time.monotonic()
        try:
            deploy(self.cluster, arguments, timeout_s=120)
            took_s = time.monotonic() - started_s
            print(f"{topology} x{replicas} answers after {took_s:.1f} s", file=sys.stderr, flush=True)
            yield self.cluster.http_port
        finally:
            clear(self.cluster)

    def plan(self, connections: int, seconds: float, **others: Any) -> Plan:
        common: dict[str, Any] = {"headers": self.scene.headers, "bodies": self.scene.bodies, "warm_s": 0.0}
        return Plan(port=self.cluster.http_port, connections=connections, seconds=seconds, **common | others)


def clear(cluster: LocalCluster) -> None:
    """Takes the application away and leaves Serve as it is; its share of the GPU is free then."""
    http_options = {"host": "127.0.0.1", "port": cluster.http_port}
    config = {"proxy_location": "EveryNode", "http_options": http_options, "applications": []}
    with httpx.Client(base_url=cluster.dashboard_url, headers=cluster.headers, timeout=60, trust_env=False) as api:
        api.put("/api/serve/applications/", json=config).raise_for_status()
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            if not api.get("/api/serve/applications/").json()["applications"]:
                return
            time.sleep(0.2)
    raise RuntimeError("the application is still there after 60 s")


class Watch:
    """How busy the GPU is while the block runs, by nvidia-smi; nothing where there is none."""

    def __enter__(self) -> "Watch":
        self._process: subprocess.Popen[str] | None = None
        if shutil.which("nvidia-smi"):
            card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            command = ["nvidia-smi", f"--id={card}", "--query-gpu=utilization.gpu,memory.used"]
            command += ["--format=csv,noheader,nounits", "-lms", "200"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.found: dict[str, Any] = {}
        if self._process is None:
            return
        self._process.terminate()
        lines = self._process.communicate()[0].splitlines()
        pairs = [[float(part) for part in line.split(",")] for line in lines if line.count(",") == 1]
        if pairs:
            busy, mib = np.array(pairs).T
            self.found = {"GPU_%": float(busy[1:].mean() if len(busy) > 1 else busy[0]), "GPU_MiB": float(mib.max())}


def spread(plan: Plan, generators: int) -> dict[str, Any]:
    """The load of several processes, as one: a slow generator must not be what is measured."""
    each = min(generators, plan.connections)
    share, more = divmod(plan.connections, each)
    plans = [replace(plan, connections=share + (one < more), mark=f"{plan.mark}-{one}") for one in range(each)]
    with ThreadPoolExecutor(each) as pool:
        found = list(pool.map(load, plans))
    weights = [part["requests"] for part in found]
    refused = sum(count for part in found for status, count in part["statuses"].items() if status != "200")
    return {
        "per_s": sum(part["per_s"] for part in found),
        "p50_ms": float(np.average([part["p50_ms"] for part in found], weights=weights)) if any(weights) else 0.0,
        "p99_ms": max(part["p99_ms"] for part in found),
        "max_ms": max(part["max_ms"] for part in found),
        "failed": sum(part["failed"] for part in found),
        "degraded": sum(part["degraded"] for part in found) + refused,
        "retried": sum(part["retried"] for part in found),
        "failures": [failure for part in found for failure in part["failures"]],
    }


def latency(bench: Bench, topology: str, replicas: int) -> None:
    """A row for each number of connections, and one of the hops of a lone request."""
    size = bench.size
    with bench.serving(replicas, topology):
        hops(bench, topology, replicas)
        for connections in size.connections:
            with Watch() as watch:
                found = spread(bench.plan(connections, size.seconds, warm_s=size.warm_s), size.generators)
            _tell_load(bench, f"{topology}", replicas, connections, found, watch.found)


def _tell_load(
    bench: Bench, what: str, replicas: int, connections: int, found: dict[str, Any], gpu: dict[str, Any]
) -> None:
    for failure in found["failures"][:3]:
        print(f"  {failure}", file=sys.stderr, flush=True)
    bench.tell(what, replicas=replicas, connections=connections, **{"req/s": found["per_s"]}, p50_ms=found["p50_ms"],
               p99_ms=found["p99_ms"], max_ms=found["max_ms"], failed=found["failed"], degraded=found["degraded"],
               retried=found["retried"], **gpu)  # fmt: skip


def hops(bench: Bench, topology: str, replicas: int) -> None:
    """Where the time of a lone request goes: what the client waits, what the service tells of its stages, the rest."""
    connection = http.client.HTTPConnection("127.0.0.1", bench.cluster.http_port, timeout=30)
    headers = bench.scene.headers | {"content-type": "application/json"}

    def ask(method: str, path: str, body: str | None) -> tuple[float, bytes]:
        started_s = time.perf_counter()
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        raw = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} gives {answer.status}: {raw[:200]!r}")
        return 1e3 * (time.perf_counter() - started_s), raw

    bodies = bench.scene.bodies
    for body in bodies[:20]:
        ask("POST", "/v1/recommend", body)
    asked = [ask("POST", "/v1/recommend", bodies[place % len(bodies)]) for place in range(bench.size.hops)]
    empty_ms = statistics.median(ask("GET", "/healthz", None)[0] for _ in range(bench.size.hops))
    told = [json.loads(raw)["timings_ms"] for _, raw in asked]
    of = {name: statistics.median(one.get(name, 0.0) for one in told) for name in STAGES}
    client_ms = statistics.median(took_ms for took_ms, _ in asked)
    parts = {name: round(value, 3) for name, value in of.items()}
    parts |= {"outside the handler": round(client_ms - of["total"], 3), "GET /healthz": round(empty_ms, 3)}
    bench.tell(f"hops {topology}", replicas=replicas, connections=1, p50_ms=client_ms, more=parts)
    connection.close()


def bulk(bench: Bench) -> None:
    """Users a second of the batch endpoint, and what a lone request waits beside it, by how many go together."""
    most = max(_bulk(bench, together) for together in bench.size.together)
    bench.check("batch endpoint", most, BULK_TARGET, "users/s", most >= BULK_TARGET)


def _bulk(bench: Bench, together: int) -> float:
    """Three requests at a time for each replica; returns users/s."""
    size, replicas = bench.size, bench.size.bulk_replicas
    load_of: dict[str, Any] = {"seconds": 2 * size.seconds, "warm_s": 2 * size.warm_s}
    with bench.serving(replicas, num_cpus=1, bulk_users=together):
        whole = bench.plan(3 * replicas, bodies=_bulk_bodies(bench), path=BULK_PATH, **load_of)
        lone = bench.plan(replicas, pace_s=size.pace_s, mark="lone", **load_of)
        with Watch() as watch, ThreadPoolExecutor(1) as pool:
            beside = pool.submit(load, lone)
            found = spread(whole, size.generators)
        users_per_s = _tell_bulk(bench, replicas, found, watch.found, f"{together} together")
        _tell_load(bench, f"lone requests beside, {together} together", replicas, replicas, beside.result(), {})
    return users_per_s


def _bulk_bodies(bench: Bench) -> list[str]:
    ids = [json.loads(body)["user_id"] for body in bench.scene.bodies]
    rng = np.random.default_rng(0)
    return [json.dumps({"user_ids": rng.choice(ids, bench.size.bulk_users).tolist(), "k": 10}) for _ in range(4)]


def _tell_bulk(bench: Bench, replicas: int, found: dict[str, Any], gpu: dict[str, Any], more: str = "") -> float:
    """A row; returns users/s."""
    users_per_s = float(found["per_s"] * bench.size.bulk_users)
    what = ", ".join(filter(None, [f"recommend:batch, {bench.size.bulk_users} users", more]))
    _tell_load(bench, what, replicas, 3 * replicas, found, gpu | {"users/s": users_per_s})
    return users_per_s


def scaled(bench: Bench) -> None:
    """One replica a GPU, from one to all: requests and batches; each replica gets the same load."""
    gpus = max(1, torch.cuda.device_count()) if bench.device == "cuda" else 2
    counts = [count for count in (1, 2, 4, 8) if count <= gpus]
    users = {count: _scaled(bench, count) for count in counts}
    most, share = counts[-1], users[counts[-1]] / counts[-1] / users[1]
    name = f"batch endpoint: users/s a GPU, {most} against one"
    bench.check(name, share, LINEAR, "", share >= LINEAR)


def _scaled(bench: Bench, gpus: int) -> float:
    size, bodies = bench.size, _bulk_bodies(bench)
    with bench.serving(gpus, own=True):
        wait_running(bench.cluster, gpus)
        for connections in (32 * gpus, 128 * gpus):
            plan = bench.plan(connections, size.seconds, warm_s=size.warm_s)
            _tell_load(bench, "one replica a GPU", gpus, connections, spread(plan, size.generators * gpus), {})
        plan = bench.plan(3 * gpus, 2 * size.seconds, warm_s=2 * size.warm_s, bodies=bodies, path=BULK_PATH)
        return _tell_bulk(bench, gpus, spread(plan, size.generators * gpus), {})


def disturbed(bench: Bench, what: str, action: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """What a paced load meets while something happens, two seconds after its start: `its_p99_ms` are of the seconds
    from just before the action until a while after it."""
    size, told = bench.size, {}
    plan = bench.plan(size.paced, seconds, pace_s=size.pace_s, warm_s=WARM_S, mark=what.replace(" ", "-"))
    thread = threading.Thread(target=lambda: told.update(load(plan)))
    thread.start()
    time.sleep(WARM_S + BEFORE_S)
    started_s = time.monotonic()
    try:
        action()
        took_s = time.monotonic() - started_s
        assert thread.is_alive(), f"{what} took {took_s:.1f} s, longer than its load"
    finally:
        thread.join()
    for failure in told["failures"]:
        print(f"  {failure}", file=sys.stderr, flush=True)
    refused = sum(count for status, count in told["statuses"].items() if status != "200")
    seconds_ms = [round(value, 2) for value in told["p99_ms_by_second"]]
    its = slice(int(BEFORE_S) - 1, math.ceil(BEFORE_S + took_s + AFTER_S))
    told["its_p99_ms"] = told["p99_ms_by_second"][its]
    bench.tell(what, replicas=2, connections=size.paced, **{"req/s": told["per_s"]}, p50_ms=told["p50_ms"],
               p99_ms=told["p99_ms"], max_ms=told["max_ms"], failed=told["failed"],
               degraded=told["degraded"] + refused, retried=told["retried"],
               more={"p99 ms by second": seconds_ms, "took s": round(took_s, 1),
                     "left out": told["left_out"]})  # fmt: skip
    return told


def faults(bench: Bench) -> None:
    """Two replicas under a paced load: nothing happens, a new version is promoted, a replica is killed."""
    size = bench.size
    with bench.serving(2):
        wait_running(bench.cluster, 2)
        quiet = disturbed(bench, "quiet", lambda: None, 8.0)
        usual_ms = statistics.median(quiet["p99_ms_by_second"])
        worst = max(swapped(bench, version) for version in range(2, 2 + size.swaps)) / usual_ms
        bench.check("hot swap: p99 of its worst second, against a usual one", worst, SPIKE, "times", worst <= SPIKE)

        def kill() -> None:
            os.kill(pids_of(bench.cluster, "FusedReplica")[0], signal.SIGKILL)
            time.sleep(3)
            wait_running(bench.cluster, 2)

        _none_failed(bench, "replica SIGKILL", disturbed(bench, "replica SIGKILL", kill, size.kill_s))


def swapped(bench: Bench, version: int) -> float:
    """The p99 of the worst second of a swap to a version that no replica holds, ms."""
    scene = bench.scene
    if version > len(scene.registry.versions(NAME)):
        scene.registry.publish(str(scene.folder / f"bundle-{2 - version % 2}"), NAME)
    with promotion(bench.cluster, scene, str(version)) as promote:
        found = disturbed(bench, "hot swap", promote, bench.size.swap_s)
    _none_failed(bench, "hot swap", found)
    return float(max(found["its_p99_ms"]))


def _none_failed(bench: Bench, what: str, found: dict[str, Any]) -> None:
    bench.check(f"{what}: failed requests (0 outside one retry)", found["failed"], 0, "requests", not found["failed"])


def large(bench: Bench, folder: Path) -> None:
    """One replica over a large catalogue: histories come with the requests."""
    size, items = bench.size, bench.size.catalogue
    scene = large_scene(folder, items)
    own = replace(bench, scene=scene)  # its rows are the same list
    with own.serving(1, seed="", max_latency_ms=5_000):
        hops(own, f"{items} items, fused", 1)
        for connections in size.connections[1:]:
            with Watch() as watch:
                found = spread(own.plan(connections, size.seconds, warm_s=size.warm_s), size.generators)
            _tell_load(own, f"{items} items, fused", 1, connections, found, watch.found)


def large_scene(folder: Path, items: int) -> Scene:
    """A bundle of random weights, and requests that bring histories along."""
    folder.mkdir()
    index = np.arange(1, items + 1)
    table = pa.table({
        "item_index": index,
        "item_id": pa.array(index.astype(str)),
        "title": pa.array(np.char.add("Item ", index.astype(str))),
        "categories": pa.array([["all"]] * items),
        "count": index[::-1].copy(),
    })  # fmt: skip
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=64, blocks=2, max_length=50)), items)
    scene = Scene(folder=folder, bodies=_histories(items), key=create_key(folder / "keys.json", "load", ("read",)))
    bundle = write_bundle(folder / "bundle", network, table, name=NAME, version="0")
    scene.registry.publish(bundle, NAME)
    scene.registry.set_label(NAME, "production", "1")
    return scene


def _histories(items: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [json.dumps({"history": rng.integers(1, items + 1, 30).astype(str).tolist(), "k": 10}) for _ in range(500)]


def scorer(bench: Bench) -> None:
    """The network's stages alone, without HTTP: recorded, launched one by one, and on a core of the CPU."""
    torch.set_num_threads(1)
    ways = {"cpu": torch.device("cpu")}
    if bench.device == "cuda":
        ways |= {name: torch.device("cuda") for name in ("recorded", "launched")}
    for way, device in ways.items():
        network = open_bundle(bench.scene.folder / "bundle-1").network()
        with gpu.loading(device):
            resident = gpu.move(network, device, 64) if way == "recorded" else None
            network.to(device)
        own = Scorer(network, ModelSetup(network=network, resident=resident))
        for rows in (1, 16, 64):
            question, took_ms = _question(network, rows), []
            for _ in range(20 + 10 * bench.size.hops // rows):
                started_s = time.perf_counter()
                own.score(question)
                took_ms.append(1e3 * (time.perf_counter() - started_s))
            p50_ms, p99_ms = np.percentile(took_ms[10:], [50, 99])
            bench.tell(f"scorer alone, {way}, {rows} rows", p50_ms=float(p50_ms), p99_ms=float(p99_ms))


def _question(network: Network, rows: int) -> Question:
    """Full histories, all of whose items are blocked."""
    item_BT = np.random.default_rng(0).integers(1, network.n_items + 1, (rows, 50)).astype(np.int32)
    row_N = np.repeat(np.arange(rows), 50)
    return Question(past=Past(item_BT), blocked_row_N=row_N, blocked_item_N=item_BT.reshape(-1).astype(np.int64), k=11)


def run(bench: Bench, folder: Path, parts: Sequence[str]) -> bool:
    """The parts that are asked for, in the order of what matters most; one that fails is told and the others go on."""
    each = bench.size.replicas
    works: dict[str, list[Callable[[], None]]] = {
        "ceiling": [lambda: ceiling(bench)],
        "scorer": [lambda: scorer(bench)],
        "fused": [partial(latency, bench, "fused", replicas) for replicas in each],
        "faults": [lambda: faults(bench)],
        "bulk": [lambda: bulk(bench)],
        "split": [partial(latency, bench, "split", replicas) for replicas in each],
        "large": [lambda: large(bench, folder / "large")],
        "scaled": [lambda: scaled(bench)],
    }
    whole = True
    for part in parts:
        for work in works[part]:
            try:
                work()
            except Exception:  # noqa: BLE001 - device time is dear
                traceback.print_exc()
                whole = False
    return whole


def ceiling(bench: Bench) -> None:
    """What the generators do against a server each that only echoes."""
    port, most = free_port(), max(bench.size.connections)
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.loadgen", "echo", str(port)], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        plan = Plan(port=port, connections=most, seconds=bench.size.seconds, warm_s=0.5)
        found = spread(plan, bench.size.generators)
    finally:
        server.kill()
        server.wait()
    _tell_load(bench, "generators against one echo", 0, most, found, {})


def _short(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


ALL = ("ceiling", "scorer", "fused", "faults", "bulk", "split", "large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, help="ML-100K, prepared; else it is fetched")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", default=",".join(ALL), help="some of them, or scaled, with commas between")
    chosen = parser.parse_args()
    size = QUICK if chosen.quick else Size()
    started_s = time.monotonic()
    most = max(*size.replicas, size.bulk_replicas, torch.cuda.device_count(), 2)
    with tempfile.TemporaryDirectory(prefix="er-gpu-") as scratch:
        scene = make_scene(Path(scratch), data=chosen.data)
        config = LocalClusterConfig(num_cpus=most + size.gateways + 2, train_slots=0, haproxy=True)
        with local_cluster(config) as cluster:
            bench = Bench(cluster=cluster, scene=scene, size=size, device=chosen.device, file=chosen.json)
            try:
                whole = run(bench, Path(scratch), chosen.parts.split(","))
            finally:
                _save_logs(cluster)
                print(f"{time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
                report(bench)
    sys.exit(not whole)


def report(bench: Bench) -> None:
    """All rows and checks, a line each: the table has too many columns for a terminal."""
    keep("gpu_serving", bench.rows, bench.checks, bench.file)
    for row in bench.rows:
        print({name: _short(value) for name, value in row.items() if value is not None})
    for one in bench.checks:
        print(f"{'holds' if one.holds else 'MISSED'}: {one.name}: {one.value:.4g} {one.unit} ({one.target:g})")


def _save_logs(cluster: LocalCluster) -> None:
    """The ends of the replicas' logs, where a folder is named for them: the cluster's own goes with it."""
    wanted = os.environ.get("GPU_SERVING_LOGS")
    if not wanted:
        return
    with suppress(OSError):
        target = Path(wanted)
        target.mkdir(parents=True, exist_ok=True)
        for log in sorted(cluster.temp_dir.glob("session_latest/logs/serve/*.log")):
            (target / log.name).write_bytes(log.read_bytes()[-20_000:])


if __name__ == "__main__":
    main()
