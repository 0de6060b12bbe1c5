"""From a data set to a loaded service, by the commands that a user types; one command, which ends by itself.

    python -m benchmarks.gpu_end_to_end --data data/ml-100k --json FILE

It starts a Ray of its own (free ports, a folder that goes with it), trains by `ray job submit` with one worker on the
GPU, compresses by another job, publishes, deploys replicas that share the GPU by `serve deploy`, asks them for some
seconds, and ends what it started. `--device cpu` is the same without a GPU. Each step is told when it is over.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml

from benchmarks.loadgen import Plan
from benchmarks.result import Check, keep
from benchmarks.scene import load
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.service import GRAPH, is_ready
from elasticrec.data.prepare import prepare_dataset
from elasticrec.data.sequences import open_store

ROOT = Path(__file__).parents[1]
NAME, REPLICAS, CONNECTIONS = "films", 2, 32
LIMIT_S = 180.0


@dataclass(kw_only=True)
class Road:
    """The folder in which everything lies, the cluster, and what each step took."""

    home: Path
    cluster: LocalCluster
    gpu: bool
    file: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs a step and tells how long it took and what it gave."""
        started_s = time.monotonic()
        found = work()
        self.rows.append({"step": name, "s": round(time.monotonic() - started_s, 1), "found": found})
        print(self.rows[-1], file=sys.stderr, flush=True)
        keep("gpu_end_to_end", self.rows, self.checks, self.file)
        return found

    def command(self, *words: str, timeout_s: float = 150) -> str:
        """What a command prints; its end is shown where it fails."""
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, env=self.cluster.env, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(words)} ended with {done.returncode}: {(done.stdout + done.stderr)[-4_000:]}"
            )
        return done.stdout

    def job(self, module: str, *arguments: str) -> str:
        """`ray job submit`; where packages come from a PYTHONPATH, workers of the job need it, too."""
        path = os.pathsep.join(filter(None, [str(ROOT / "platform"), os.environ.get("PYTHONPATH")]))
        environment = json.dumps({"env_vars": {"ELASTICREC_HOME": str(self.home), "PYTHONPATH": path}})
        submit = ["ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--runtime-env-json", environment]
        return self.command(*submit, "--", "python", "-m", module, *arguments)


def train(road: Road, epochs: int) -> dict[str, Any]:
    """One worker, on the GPU."""
    config = {
        "name": NAME,
        "data": str(road.home / "data"),
        "storage": str(road.home / "runs"),
        "epochs": epochs,
        "network": {"encoder": {"width": 64, "blocks": 2, "max_length": 50}},
        "plan": {"batch_users": 128},
        "validation": {"every_epochs": max(1, epochs // 2)},
        "elastic": {"min_workers": 1, "max_workers": 1, "gpus_per_worker": 1.0 if road.gpu else 0.0},
    }
    (road.home / "train.yaml").write_text(yaml.safe_dump(config))
    road.job("jobs.train", "--config", str(road.home / "train.yaml"))
    manifest = json.loads((road.home / "runs" / NAME / "bundle" / "manifest.json").read_text())
    return {"test ndcg@10": manifest["metrics"]["test"]["ndcg@10"]}


def compress(road: Road) -> dict[str, Any]:
    """The int8 table against the teacher's."""
    space = {"recipes": [[], [{"kind": "int8_table"}]], "budget": "ndcg@10>=0.5*teacher", "measure": {"rounds": 20}}
    (road.home / "space.yaml").write_text(yaml.safe_dump(space))
    told = road.job("jobs.compress", str(road.home / "runs" / NAME / "bundle"), "--data", str(road.home / "data"),
                    "--out", str(road.home / "small"), "--space", str(road.home / "space.yaml"))  # fmt: skip
    chosen = [line for line in told.splitlines() if line.startswith("chosen bundle")]
    return {"chosen": Path(chosen[-1].split(": ", 1)[1]).name if chosen else None}


def publish(road: Road) -> None:
    registry = ["elasticrec.cli", "registry", "publish", str(road.home / "small"), "--name", NAME]
    road.command(*registry, "--root", str(road.home / "registry"), "--label", "production")


def deploy(road: Road) -> dict[str, Any]:
    """`serve deploy`, until a replica answers and all run."""
    arguments = {
        "bundle": f"{road.home}/registry#{NAME}@production",
        "events": str(road.home / "events.sqlite"),
        "seed": str(road.home / "data"),
        "replicas": REPLICAS,
    } | ({"num_gpus": 0.5} if road.gpu else {})
    application = {"name": "recommender", "route_prefix": "/", "import_path": GRAPH, "args": arguments}
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": road.cluster.http_port},
        "applications": [application],
    }
    file = road.home / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    road.command("ray.serve.scripts", "deploy", str(file), "--address", road.cluster.dashboard_url)
    url = f"http://127.0.0.1:{road.cluster.http_port}"
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        status = _status(road.cluster)
        if status == "DEPLOY_FAILED":
            raise RuntimeError(f"the service does not start: {_details(road.cluster)}")
        if status == "RUNNING" and is_ready(url):
            return {"replicas": REPLICAS, "num_gpus": arguments.get("num_gpus", 0)}
        time.sleep(0.3)
    raise RuntimeError(f"the service does not answer within 120 s: {_details(road.cluster)}")


def _details(cluster: LocalCluster) -> dict[str, Any]:
    place = f"{cluster.dashboard_url}/api/serve/applications/"
    with httpx.Client(timeout=30, trust_env=False) as http:
        found: dict[str, Any] = http.get(place).json()["applications"].get("recommender", {})
    return found


def _status(cluster: LocalCluster) -> str:
    return str(_details(cluster).get("status"))


def ask(road: Road, seconds: float) -> dict[str, Any]:
    """Users of the data set, over some connections."""
    users = [str(user) for user in open_store(road.home / "data").users().column("user_id").to_pylist()]
    bodies = [json.dumps({"user_id": user, "k": 10}) for user in users]
    url = f"http://127.0.0.1:{road.cluster.http_port}/v1/recommend"
    answer = httpx.post(url, content=bodies[0], headers={"content-type": "application/json"}, trust_env=False).json()
    plan = Plan(port=road.cluster.http_port, connections=CONNECTIONS, seconds=seconds, warm_s=1.0, bodies=bodies)
    found = load(plan)
    told = {name: found[name] for name in ("requests", "per_s", "p50_ms", "p99_ms", "failed", "degraded", "retried")}
    return told | {"source": answer["source"], "model_version": answer["model_version"], "items": len(answer["items"])}


def walk(road: Road, chosen: argparse.Namespace, started_s: float) -> None:
    road.step("train (ray job submit)", lambda: train(road, chosen.epochs))
    road.step("compress (ray job submit)", lambda: compress(road))
    road.step("publish", lambda: publish(road))
    road.step("deploy (serve deploy)", lambda: deploy(road))
    found = road.step("load", lambda: ask(road, chosen.seconds))
    took_s = time.monotonic() - started_s
    road.checks += [
        Check(name="failed requests", value=found["failed"], target=0, unit="requests", holds=found["failed"] == 0),
        Check(name="answers are the model's", value=float(found["source"] == "model" and not found["degraded"]),
              target=1, unit="", holds=found["source"] == "model" and not found["degraded"]),
        Check(name="the whole road", value=took_s, target=LIMIT_S, unit="s", holds=took_s < LIMIT_S),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="ML-100K, prepared; else it is fetched")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="er-road-") as scratch:
        home = Path(scratch)
        if chosen.data is None:
            prepare_dataset("ml-100k", home / "data")
        else:
            shutil.copytree(chosen.data, home / "data")
        with local_cluster(LocalClusterConfig(num_cpus=6, train_slots=1, haproxy=True)) as cluster:
            road = Road(home=home, cluster=cluster, gpu=chosen.device == "cuda", file=chosen.json)
            walk(road, chosen, started_s)
    keep("gpu_end_to_end", road.rows, road.checks, road.file)
    for one in road.checks:
        print(f"{'holds' if one.holds else 'MISSED'}: {one.name}: {one.value:.4g} {one.unit} ({one.target:g})")
    if not all(one.holds for one in road.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
