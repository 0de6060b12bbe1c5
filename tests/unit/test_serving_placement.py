"""Where replicas that keep events may lie, without a cluster."""

from pathlib import Path
from typing import Any

import pytest

from elasticrec.errors import ConfigError
from elasticrec.serving.placement import fits, require_one_host


def node(host: str, *, cpus: float = 4.0, alive: bool = True, kind: str | None = None) -> dict[str, Any]:
    """What `ray.nodes()` says of a node, as far as it is read; a node without CPUs does not list them."""
    resources = {"CPU": cpus} if cpus else {"memory": 1.0}
    labels = {"ray.io/node-id": host} | ({"kind": kind} if kind else {})
    return {"NodeManagerHostname": host, "Alive": alive, "Resources": resources, "Labels": labels}


def test_several_replicas_on_several_hosts_would_each_keep_events_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"2 replicas keep events .* 2 hosts \(a, b\)"):
        require_one_host([node("a"), node("b")], replicas=2, num_cpus=1, label_selector={})
    with pytest.raises(ConfigError):  # a replica that reserves nothing may lie anywhere
        require_one_host([node("a"), node("b", cpus=0)], replicas=2, num_cpus=0, label_selector={})


@pytest.mark.parametrize(
    ("nodes", "replicas"),
    [
        ([node("a"), node("b")], 1),
        ([node("a")], 8),
        ([node("a"), node("a")], 8),
        ([node("a"), node("b", alive=False)], 2),
        ([node("head", cpus=0), node("a")], 2),
    ],
    ids=["one replica", "one node", "two nodes of one host", "a node that is gone", "a head that runs nothing"],
)
def test_replicas_that_share_a_host_share_its_file(nodes: list[dict[str, Any]], replicas: int) -> None:
    require_one_host(nodes, replicas, num_cpus=1, label_selector={})


CLUSTER = [node("a", kind="gateway"), node("b", kind="trainer"), node("c", kind="spot"), node("d")]


@pytest.mark.parametrize(
    ("condition", "hosts"),
    [
        ("gateway", "a"),
        ("!gateway", "b c d"),
        ("in(gateway, spot)", "a c"),
        ("in(gateway,gateway)", "a"),
        ("!in(gateway, spot)", "b d"),
        ("!in(gateway, spot,trainer)", "d"),
        ("shop", ""),
    ],
)
def test_hosts_count_whose_labels_are_asked_for(condition: str, hosts: str) -> None:
    selector = {"kind": condition}
    assert [one["NodeManagerHostname"] for one in CLUSTER if fits(one["Labels"], selector)] == hosts.split()
    if len(hosts.split()) < 2:
        require_one_host(CLUSTER, replicas=2, num_cpus=1, label_selector=selector)
    else:
        with pytest.raises(ConfigError, match=rf"{len(hosts.split())} hosts \({', '.join(hosts.split())}\)"):
            require_one_host(CLUSTER, replicas=2, num_cpus=1, label_selector=selector)


def test_all_labels_that_are_asked_for_must_fit() -> None:
    require_one_host(CLUSTER, 2, 1, {"kind": "!spot", "ray.io/node-id": "in(a, c)"})
    with pytest.raises(ConfigError, match=r"2 hosts \(a, d\)"):
        require_one_host(CLUSTER, 2, 1, {"kind": "!spot", "ray.io/node-id": "!b"})


@pytest.mark.parametrize(("topology", "replicas"), [("fused", 1), ("split", 2)])
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # in Ray's own code
def test_every_replica_asks_for_the_labels_of_the_argument(tmp_path: Path, topology: str, replicas: int) -> None:
    placed = [options.get("label_selector") for options in actor_options(tmp_path, topology, '{"kind": "gateway"}')]
    assert placed == [{"kind": "gateway"}] * replicas
    assert [options.get("label_selector") for options in actor_options(tmp_path, topology, "")] == [None] * replicas


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # in Ray's own code
def test_labels_that_ray_does_not_understand_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label"):
        actor_options(tmp_path, "fused", '{"kind": "in(gateway"}')


def actor_options(folder: Path, topology: str, label_selector: str) -> list[dict[str, Any]]:
    """What Ray is asked for each of the application's deployments, from arguments as `serve run` gives them."""
    from ray.serve._private.build_app import build_app

    from elasticrec.serving.graph import Args, app

    (folder / "manifest.json").touch()  # as far as the builder looks
    given = {"bundle": str(folder), "topology": topology, "label_selector": label_selector}
    built = build_app(app(Args.model_validate(given)), name="checked")
    return [deployment.ray_actor_options for deployment in built.deployments]
