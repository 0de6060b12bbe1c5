"""The service on a real cluster with HAProxy, started in the ways a user starts it, and asked over HTTP."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from elasticrec.artifact.bundle import write_bundle
from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.data.sequences import Sequences, write_store
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.auth import create_key, revoke_key

ROOT = Path(__file__).resolve().parents[2]
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
N_ITEMS = 40
START_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=0, haproxy=True)) as running:
        serve(running, "start", "--http-host", "127.0.0.1", "--http-port", str(running.http_port))
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one version labelled production, and a prepared data set of one user."""
    place = tmp_path_factory.mktemp("served")
    index = np.arange(1, N_ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [f"Item {number}" for number in index],
            "categories": [["drama"]] * N_ITEMS,
            "count": index[::-1],
        }
    )
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=10)), N_ITEMS)
    bundle = write_bundle(place / "bundle", network, items, name="tiny", version="1")
    registry = Registry(place / "registry")
    registry.set_label("recommender", "production", registry.publish(bundle, "recommender"))
    sequences = Sequences(
        item_E=np.array([5, 6, 7], dtype=np.int32),
        offset_U1=np.array([0, 3], dtype=np.int64),
        time_E=np.array([1, 2, 3], dtype=np.int64),
    )
    users = pa.table({"user_index": [0], "user_id": ["known"]})
    write_store(place / "data", sequences, users, items, command="test")
    return place


def serve(cluster: LocalCluster, *arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*SERVE, *arguments],
        env=cluster.env | (env or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def serve_run(cluster: LocalCluster, folder: Path, *arguments: str) -> Iterator[httpx.Client]:
    """`serve run serve_apps.recommender:app …` as a child that Ctrl-C ends; a client of what it serves."""
    log = folder / f"serve-run-{time.monotonic_ns()}.log"
    command = [*SERVE, "run", "serve_apps.recommender:app", f"events={folder}/events.sqlite", *arguments]
    with log.open("w") as output:
        child = subprocess.Popen(command, env=cluster.env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        with client(cluster) as connected:
            wait_ready(connected, child, log)
            yield connected
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(timeout=60)
        # Ctrl-C ends Serve as a whole, and the next start must choose its address again.
        serve(cluster, "start", "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port))


def client(cluster: LocalCluster, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{cluster.http_port}", headers=headers, timeout=30, trust_env=False)


def wait_ready(connected: httpx.Client, child: "subprocess.Popen[bytes] | None", log: Path | None) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            answer = connected.get("/readyz")
            if answer.status_code == 200 and answer.json()["status"] == "ready":
                return
        except (httpx.TransportError, ValueError):
            pass
        text = log.read_text() if log else ""
        assert child is None or child.poll() is None, text
        assert time.monotonic() < deadline_s, text
        time.sleep(0.1)


def recommend(connected: httpx.Client, **body: Any) -> Any:
    answer = connected.post("/v1/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def item_ids(answer: Any) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def assert_serves(connected: httpx.Client, user: str) -> None:
    """Popular items at first; after one event the model answers, and the item is not in it any more."""
    assert recommend(connected, user_id=user)["source"] == "popularity"
    before = recommend(connected, user_id="known", k=5)
    assert before["source"] == "model"
    assert before["model_version"] == "recommender:1"
    assert before["history_length"] == 3
    assert not {"i5", "i6", "i7"} & set(item_ids(before))
    assert {"history", "encode", "retrieve", "queue", "total"} <= set(before["timings_ms"])
    liked = item_ids(before)[0]
    answer = connected.post("/v1/events", json={"events": [{"user_id": user, "item_id": liked}]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["accepted"] == 1
    after = recommend(connected, user_id=user, k=200)
    assert after["source"] == "model"
    assert len(after["items"]) == N_ITEMS - 1
    assert liked not in item_ids(after)
    assert connected.get(f"/v1/items/{liked}").json()["categories"] == ["drama"]
    assert connected.get("/openapi.json").json()["info"]["title"] == "elasticrec"
    assert "swagger" in connected.get("/docs").text


def assert_no_input_breaks_it(connected: httpx.Client) -> None:
    bad = {
        b"{": 400,
        b"": 422,
        b'{"user_id": "a", "k": NaN}': 422,
        b'{"user_id": "a", "k": 1e9}': 422,
        b'{"user_id": 7}': 422,
        b'{"user_id": "\\ud800"}': 422,
        b'{"user_id": "\xff"}': 400,
        b'{"user_id": "' + b"x" * 10_000_000 + b'"}': 413,
    }
    for body, status in bad.items():
        answer = connected.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, (body[:40], answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert "Traceback" not in answer.text
    assert connected.get("/v1/items/none").status_code == 404
    assert connected.get("/nothing").status_code == 404
    assert recommend(connected, history=["?"])["source"] == "popularity"


def assert_stands_load(cluster: LocalCluster) -> None:
    def ask(number: int) -> tuple[str, list[str]]:
        with client(cluster) as connected:
            answers = [recommend(connected, history=[f"i{number % N_ITEMS + 1}"], k=3) for _ in range(10)]
        assert all(item_ids(answer) == item_ids(answers[0]) for answer in answers)
        return f"i{number % N_ITEMS + 1}", item_ids(answers[0])

    with ThreadPoolExecutor(16) as pool:
        for asked, returned in pool.map(ask, range(16)):
            assert len(returned) == 3
            assert asked not in returned


@pytest.mark.parametrize("topology", ["fused", "split"])
def test_serve_run(cluster: LocalCluster, folder: Path, topology: str) -> None:
    bundle = f"{folder}/registry#recommender@production"
    arguments = [f"bundle={bundle}", f"topology={topology}", f"seed={folder}/data"]
    with serve_run(cluster, folder, *arguments) as connected:
        assert_serves(connected, user=f"user of {topology}")
        assert_no_input_breaks_it(connected)
        assert_stands_load(cluster)
        assert connected.get("/healthz").json()["model_version"] == "recommender:1"


def test_serve_deploy_with_keys_keeps_events(cluster: LocalCluster, folder: Path) -> None:
    """The deploy file as it is, but for its paths; the event that the run before acknowledged is there."""
    keys = folder / "keys.json"
    key, other = create_key(keys, "shop"), create_key(keys, "other")
    config = yaml.safe_load((ROOT / "serve_apps" / "recommender.yaml").read_text())
    config["http_options"]["port"] = cluster.http_port
    relative = os.path.relpath(folder, Path.cwd())  # Ray was started here: the file's own path is relative as well
    config["applications"][0]["args"] |= {
        "bundle": f"{relative}/registry#recommender@production",
        "events": f"{folder}/events.sqlite",
        "seed": f"{folder}/data",
        "keys": str(keys),
    }
    (folder / "deploy.yaml").write_text(yaml.safe_dump(config))
    serve(cluster, "deploy", str(folder / "deploy.yaml"))
    with client(cluster, authorization=f"Bearer {key}") as connected, client(cluster) as stranger:
        wait_ready(stranger, None, None)
        assert_serves(connected, user="user of deploy")
        for earlier in ("user of fused", "user of split"):
            assert recommend(connected, user_id=earlier)["source"] == "model"
        for headers in ({}, {"authorization": "Bearer er_wrong"}):
            answer = stranger.post("/v1/recommend", json={"user_id": "a"}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["content-type"] == "application/problem+json"
        assert stranger.get("/v1/items/i1", headers={"x-api-key": other}).status_code == 200
        revoke_key(keys, "other")
        assert stranger.get("/v1/items/i1", headers={"x-api-key": other}).status_code == 401


def test_without_a_key_only_loopback_is_served(cluster: LocalCluster, folder: Path) -> None:
    """Serve that listens on every interface: the replica refuses to start and says what to do."""
    serve(cluster, "shutdown", "--yes")
    serve(cluster, "start", "--http-host", "0.0.0.0", "--http-port", str(cluster.http_port))
    command = [*SERVE, "run", "--non-blocking", "serve_apps.recommender:app"]
    command += [f"bundle={folder}/bundle", f"events={folder}/events.sqlite"]
    done = subprocess.run(
        command, env=cluster.env, cwd=ROOT, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    assert "no API key is configured and Serve listens on 0.0.0.0" in done.stdout + done.stderr
    assert "elasticrec serve key" in done.stdout + done.stderr
    with client(cluster) as connected, pytest.raises(httpx.ConnectError):  # the failed run has ended Serve
        connected.get("/healthz")


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # in Ray's own code
def test_the_deploy_file_fits_the_arguments() -> None:
    from elasticrec.serving.graph import Args

    config = yaml.safe_load((ROOT / "serve_apps" / "recommender.yaml").read_text())
    args = Args.model_validate(config["applications"][0]["args"])
    assert args.bundle == "runs/quickstart/registry#recommender@production"
    assert args.keys is None
    assert config["http_options"]["host"] == "127.0.0.1"  # as long as there are no keys
