"""The nodes of a cluster in; whether replicas that keep events may lie on them."""

from collections.abc import Iterable, Mapping
from typing import Any

from elasticrec.errors import ConfigError


def require_one_host(nodes: Iterable[Mapping[str, Any]], replicas: int, num_cpus: float) -> None:
    """Raises ConfigError when replicas that keep events could come to lie on several hosts, each with its own file.

    Args:
        nodes: as `ray.nodes()` gives them; several may share a host, and with it the file.
        replicas: how many keep events.
        num_cpus: what each of them reserves; hosts without so many CPUs get none.
    """
    hosts = {
        node["NodeManagerHostname"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= num_cpus
    }
    if replicas > 1 and len(hosts) > 1:
        raise ConfigError(
            f"{replicas} replicas keep events in an SQLite file, which one host has, and Ray may place them on "
            f"{len(hosts)} hosts ({', '.join(sorted(hosts))}); ask for one (replicas=1 when fused, gateways=1 when "
            "split), or serve from a cluster of one host"
        )
