"""Users a second of `POST /v1/recommend:batch` on the graph as it is served: Serve behind HAProxy, fused, one replica.

A made-up catalogue and histories of ML-100K's size (1,682 items, 943 users of 20 to 200 events), d=64, 2 blocks, L=50,
k=10, 4,000 users a request, one request at a time; and how long lone requests take that come meanwhile. The same
requests one by one over `POST /v1/recommend` are the comparison.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import torch

from benchmarks.result import Check, options, publish
from elasticrec.artifact.bundle import write_bundle
from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.cli.service import deploy
from elasticrec.data.sequences import Sequences, write_store
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig

ITEMS, USERS, USERS_A_REQUEST, CONNECTIONS = 1_682, 943, 4_000, 64
TARGET = 2_500


def make(folder: Path, n_users: int = USERS) -> dict[str, Any]:
    """Arguments of the graph."""
    rng = np.random.default_rng(0)
    index = np.arange(1, ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [str(number) for number in index],
            "title": [f"A title of usual length {number} (1994)" for number in index],
            "categories": [["drama", "war"]] * ITEMS,
            "count": index[::-1],
        }
    )
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=64, blocks=2, max_length=50)), ITEMS)
    write_bundle(folder / "bundle", network, items, name="batch", version="1")
    lengths = rng.integers(20, 200, n_users)
    item_E = np.concatenate([rng.choice(ITEMS, length, replace=False) + 1 for length in lengths]).astype(np.int32)
    sequences = Sequences(
        item_E=item_E, offset_U1=np.concatenate([[0], lengths.cumsum()]), time_E=np.arange(len(item_E))
    )
    users = pa.table({"user_index": np.arange(n_users), "user_id": [str(user) for user in range(n_users)]})
    write_store(folder / "data", sequences, users, items, command="benchmarks.batch")
    return {"bundle": str(folder / "bundle"), "events": str(folder / "events.sqlite"), "seed": str(folder / "data")}


async def load(url: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    rng = np.random.default_rng(1)
    user_ids = [str(user) for user in rng.integers(0, USERS, USERS_A_REQUEST)]
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client:
        rows = []
        for encoding in ("identity", "gzip"):
            rows.append(await bulk(client, user_ids, encoding, rounds))
    return rows


async def bulk(client: httpx.AsyncClient, user_ids: list[str], encoding: str, rounds: int) -> dict[str, Any]:
    """Requests of all users, one after the other, with a lone request every 50 ms beside them."""
    lone_ms: list[float] = []
    done = asyncio.Event()

    async def lone() -> None:
        while not done.is_set():
            started_s = time.perf_counter()
            (await client.post("/v1/recommend", json={"user_id": "7"})).raise_for_status()
            lone_ms.append(1e3 * (time.perf_counter() - started_s))
            await asyncio.sleep(0.05)

    beside = asyncio.create_task(lone())
    speeds = []
    for number in range(rounds + 1):
        started_s = time.perf_counter()
        answer = await client.post(
            "/v1/recommend:batch", json={"user_ids": user_ids}, headers={"accept-encoding": encoding}
        )
        answer.raise_for_status()
        if number:  # the first one warms up
            speeds.append(len(user_ids) / (time.perf_counter() - started_s))
    done.set()
    await beside
    assert len(answer.json()["results"]) == len(user_ids)
    return {
        "way": f"recommend:batch, {len(user_ids)} users a request, {encoding}",
        "users_per_s": statistics.median(speeds),
        "lone_request_p50_ms": statistics.median(lone_ms),
        "lone_request_max_ms": max(lone_ms),
    }


def one_by_one(url: str) -> dict[str, Any]:
    """The same users as single requests over many connections."""
    bodies = [json.dumps({"user_id": str(user)}) for user in range(USERS)]
    plan = {"port": int(url.rsplit(":", 1)[1]), "connections": CONNECTIONS, "seconds": 8, "warm_s": 2, "bodies": bodies}
    command = [sys.executable, "-m", "benchmarks.loadgen"]
    told = json.loads(
        subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, check=True).stdout
    )
    return {
        "way": f"recommend, {CONNECTIONS} connections",
        "users_per_s": told["per_s"],
        "lone_request_p50_ms": None,
        "lone_request_max_ms": None,
    }


def main() -> None:
    chosen = options(__doc__ or "")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = make(Path(scratch))
        with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=0, haproxy=True)) as cluster:
            url = deploy(cluster, arguments, timeout_s=300)
            rows = asyncio.run(load(url, 3 if chosen.quick else 10))
            rows.append(one_by_one(url))
    publish("batch", rows, list(checks(rows)), chosen.json)


def checks(rows: list[dict[str, Any]]) -> Iterator[Check]:
    """The target of the issue."""
    speed = rows[0]["users_per_s"]
    yield Check(name="batch endpoint", value=speed, target=TARGET, unit="users/s", holds=speed >= TARGET)


if __name__ == "__main__":
    main()
