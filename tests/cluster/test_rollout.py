"""Versions of a running service, on a cluster with HAProxy: moved under load without a failed request, or refused."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import write_bundle
from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.service import deploy
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig

N_ITEMS = 40
PAUSE_S = 0.05  # between two requests of a connection: a load that leaves the cluster something of two cores


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """One for each test: Serve drains the replicas of the topology before while the next one starts."""
    with local_cluster(LocalClusterConfig(num_cpus=4, train_slots=0, haproxy=True)) as running:
        yield running


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Versions 1 to 3 of `films`; production is 1."""
    index = np.arange(1, N_ITEMS + 1)
    items = pa.table({"item_index": index, "item_id": [f"i{n}" for n in index], "title": [f"T{n}" for n in index],
                      "categories": [["x"]] * N_ITEMS, "count": index[::-1]})  # fmt: skip
    registry = Registry(tmp_path / "registry")
    for seed in range(3):
        torch.manual_seed(seed)
        network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=6)), N_ITEMS)
        registry.publish(write_bundle(tmp_path / f"b{seed}", network, items, name="films", version="0"), "films")
    registry.set_label("films", "production", "1")
    return registry


@dataclass
class Load:
    """What constant requests came to."""

    url: str
    versions: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=20, trust_env=False) as client:
            count = 0
            while not self._stop.is_set():
                time.sleep(PAUSE_S)
                body = {"user_id": f"user {number} {count % 50}", "history": ["i3", "i5"], "k": 3}
                count += 1
                try:
                    answer = client.post("/v1/recommend", json=body)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code != 200 or answer.json()["degraded"]:
                    self.failures.append(answer.text)
                else:
                    self.versions.append(answer.json()["model_version"])


@contextmanager
def under_load(url: str, connections: int = 4) -> Iterator[Load]:
    load = Load(url)
    threads = [threading.Thread(target=load.run, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load._stop.set()
        for thread in threads:
            thread.join()


def command(cluster: LocalCluster, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elasticrec.cli", "registry", *words],
        env=cluster.env, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def asked_now(url: str, count: int = 20) -> set[str]:
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        return {
            client.post("/v1/recommend", json={"user_id": f"late {number}", "history": ["i1"]}).json()["model_version"]
            for number in range(count)
        }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("topology", ["fused", "split"])
def test_versions_move_under_load_and_bad_ones_are_refused(
    cluster: LocalCluster, registry: Registry, tmp_path: Path, topology: str
) -> None:
    root = registry.root.uri
    arguments = {
        "bundle": f"{root}#films@production", "topology": topology, "replicas": 2, "num_cpus": 0.5,
        "gateway_cpus": 0.5, "events": str(tmp_path / "events.sqlite"), "timeout_ms": 20_000,
        "max_latency_ms": 2_000, "label_selector": {"kind": "!spot"},
    }  # fmt: skip
    url = deploy(cluster, arguments)
    # The application may still drain replicas of the topology before; its answers are of this one now.
    deadline_s = time.monotonic() + 60
    while asked_now(url, 3) != {"films:1"}:
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
    bad = Path(registry.resolve("films", "3"), "weights.safetensors")
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    with under_load(url) as load:
        done = command(cluster, "promote", "--name", "films", "--version", "2", "--root", root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert asked_now(url) == {"films:2"}

        done = command(cluster, "promote", "--name", "films", "--version", "3", "--root", root)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "weights.safetensors' is damaged" in done.stderr
        assert registry.labels("films")["production"] == "2"
        assert asked_now(url) == {"films:2"}

        done = command(cluster, "rollback", "--name", "films", "--root", root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert registry.labels("films")["production"] == "1"
        assert asked_now(url) == {"films:1"}

        done = command(cluster, "canary", "--name", "films", "--version", "2", "--percent", "50", "--root", root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert asked_now(url, 40) == {"films:1", "films:2"}

        done = command(cluster, "shadow", "--name", "films", "--version", "2", "--percent", "100", "--root", root)
        assert done.returncode == 0, done.stdout + done.stderr
        assert registry.labels("films") == {"production": "1", "canary": "2", "shadow": "2"}
    assert load.failures == []
    assert len(load.versions) > 100
    assert set(load.versions) == {"films:1", "films:2"}

    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        ready = client.get("/readyz").json()
    assert ready["refused"] == [], json.dumps(ready)


@pytest.mark.timeout(300)
def test_a_configuration_that_names_a_bad_bundle_shows_it_and_changes_nothing(
    cluster: LocalCluster, registry: Registry, tmp_path: Path
) -> None:
    """Whoever writes a user_config by hand, past the command."""
    root, bad = registry.root.uri, Path(registry.resolve("films", "2"))
    arguments = {
        "bundle": f"{root}#films@production", "num_cpus": 0.5, "events": str(tmp_path / "events.sqlite"),
        "timeout_ms": 20_000, "max_latency_ms": 2_000,
    }  # fmt: skip
    url = deploy(cluster, arguments)
    deadline_s = time.monotonic() + 60
    while asked_now(url, 3) != {"films:1"}:
        assert time.monotonic() < deadline_s
        time.sleep(0.5)
    golden = json.loads((bad / "golden.json").read_text())
    golden["questions"][0]["scores"][0] += 5  # and the manifest made to fit, as a wrong tool would
    (bad / "golden.json").write_text(json.dumps(golden))
    with under_load(url) as load, httpx.Client(headers=cluster.headers, timeout=30, trust_env=False) as api:
        place = f"{cluster.dashboard_url}/api/serve/applications/"
        config = api.get(place).json()["applications"]["recommender"]["deployed_app_config"]
        config["deployments"] = [{"name": "FusedReplica", "user_config": {"production": str(bad)}}]
        put = {"http_options": {"host": "127.0.0.1", "port": cluster.http_port}, "applications": [config]}
        api.put(place, json=put).raise_for_status()
        with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
            while not (ready := client.get("/readyz").json())["refused"]:
                assert time.monotonic() < deadline_s + 60
                time.sleep(0.2)
    assert ready["refused"] == ["versions/2"]
    assert ready["model_version"] == "films:1"
    assert load.failures == []
    assert set(load.versions) == {"films:1"}
