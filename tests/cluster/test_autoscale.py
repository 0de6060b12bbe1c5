"""Replicas come with the load and go without a failed request, on a real cluster."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.service import deploy
from tests.cluster.test_rollout import registry, under_load

__all__ = ["registry"]  # a fixture


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=4, train_slots=0, haproxy=True)) as running:
        yield running


def replicas(cluster: LocalCluster) -> int:
    answer = httpx.get(f"{cluster.dashboard_url}/api/serve/applications/", headers=cluster.headers, trust_env=False)
    found = answer.json()["applications"]["recommender"]["deployments"]["FusedReplica"]["replicas"]
    return sum(replica["state"] == "RUNNING" for replica in found)


def wait_for(cluster: LocalCluster, count: int, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (found := replicas(cluster)) != count:
        assert time.monotonic() < deadline_s, f"{found} replicas, {count} were expected"
        time.sleep(0.5)


@pytest.mark.timeout(600)
def test_replicas_follow_the_load(cluster: LocalCluster, registry: Registry, tmp_path: Path) -> None:
    arguments = {
        "bundle": f"{registry.root.uri}#films@production", "events": str(tmp_path / "events.sqlite"),
        "num_cpus": 0.5, "min_replicas": 1, "max_replicas": 2, "target_latency_ms": 1.0,
        "timeout_ms": 20_000, "max_latency_ms": 2_000,
        "upscale_delay_s": 1, "downscale_delay_s": 3,
    }  # fmt: skip
    url = deploy(cluster, arguments)
    assert replicas(cluster) == 1
    with under_load(url, connections=8) as load:
        wait_for(cluster, 2)
        time.sleep(3)
    with under_load(url, connections=1) as quiet:  # some load stays while a replica drains
        quiet._stop.wait(0.1)
    wait_for(cluster, 1)
    assert load.failures == []
    assert quiet.failures == []
    assert len(load.versions) > 100
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        assert client.post("/v1/recommend", json={"history": ["i1"]}).status_code == 200
