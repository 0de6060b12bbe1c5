"""Replicas come with the load and go without a failed request, on a real cluster, where their labels say."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, LocalNode, local_cluster
from elasticrec.cli.service import deploy
from elasticrec.cli.web import get
from elasticrec.errors import ConfigError
from elasticrec.serving.placement import require_one_host
from tests.cluster.test_rollout import registry, under_load

__all__ = ["registry"]  # a fixture
LABELS = {"kind": "gateway"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=4, train_slots=0, haproxy=True)) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(cluster: LocalCluster) -> Iterator[LocalNode]:
    """A second node, with a label; the head has as much room."""
    node = cluster.add_node(num_cpus=4, train_slots=0, labels=LABELS)
    yield node
    cluster.remove_node(node)


def places(cluster: LocalCluster) -> list[str]:
    """Of each replica that runs, the node."""
    answer = get(f"{cluster.dashboard_url}/api/serve/applications/", headers=cluster.headers)
    found = answer.json()["applications"]["recommender"]["deployments"]["FusedReplica"]["replicas"]
    return [replica["node_id"] for replica in found if replica["state"] == "RUNNING"]


def nodes(cluster: LocalCluster) -> list[dict[str, Any]]:
    """What a replica asks Ray, with a host for each node."""
    code = "import json, ray; ray.init(log_to_driver=False); print(json.dumps(ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", code], env=cluster.env, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [node | {"NodeManagerHostname": node["NodeID"]} for node in found]


def wait_for(cluster: LocalCluster, count: int, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (found := len(places(cluster))) != count:
        assert time.monotonic() < deadline_s, f"{found} replicas, {count} were expected"
        time.sleep(0.5)


@pytest.mark.timeout(600)
def test_replicas_follow_the_load_and_the_labels(
    cluster: LocalCluster, gateway: LocalNode, registry: Registry, tmp_path: Path
) -> None:
    found = nodes(cluster)
    require_one_host(found, 2, 0.5, LABELS)
    with pytest.raises(ConfigError, match="2 hosts"):
        require_one_host(found, 2, 0.5, {})
    arguments = {
        "bundle": f"{registry.root.uri}#films@production", "events": str(tmp_path / "events.sqlite"),
        "num_cpus": 0.5, "min_replicas": 1, "max_replicas": 2, "target_latency_ms": 1.0,
        "timeout_ms": 20_000, "max_latency_ms": 2_000,
        "upscale_delay_s": 1, "downscale_delay_s": 3, "label_selector": LABELS,
    }  # fmt: skip
    url = deploy(cluster, arguments)
    assert places(cluster) == [gateway.node_id]
    with under_load(url, connections=8) as load:
        wait_for(cluster, 2)
        assert places(cluster) == [gateway.node_id] * 2
        time.sleep(3)
    with under_load(url, connections=1) as quiet:  # some load stays while a replica drains
        quiet._stop.wait(0.1)
    wait_for(cluster, 1)
    assert load.failures == []
    assert quiet.failures == []
    assert len(load.versions) > 100
    with httpx.Client(base_url=url, timeout=20, trust_env=False) as client:
        assert client.post("/v1/recommend", json={"history": ["i1"]}).status_code == 200
