"""The nodes of a cluster and what replicas ask of one in; whether replicas that keep events may lie on them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from elasticrec.errors import ConfigError

_CONDITION: Final = re.compile(r"(?P<no>!?)(?:(?:in)?\((?P<several>.*)\)|(?P<one>.*))")  # as Ray has label selectors


def require_one_host(
    nodes: Iterable[Mapping[str, Any]], replicas: int, num_cpus: float, label_selector: Mapping[str, str]
) -> None:
    """Raises ConfigError when replicas that keep events could come to lie on several hosts, each with its own file.

    Args:
        nodes: as `ray.nodes()` gives them; several may share a host, and with it the file.
        replicas: how many keep events.
        num_cpus: what each of them reserves; hosts without so many CPUs get none.
        label_selector: what each of them asks of its node's labels; other nodes get none.
    """
    hosts = {
        node["NodeManagerHostname"]
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) >= num_cpus and fits(node["Labels"], label_selector)
    }
    if replicas > 1 and len(hosts) > 1:
        raise ConfigError(
            f"{replicas} replicas keep events in an SQLite file, which one host has, and Ray may place them on "
            f"{len(hosts)} hosts ({', '.join(sorted(hosts))}); ask for one (replicas=1 when fused, gateways=1 when "
            "split), name labels that one host alone has (label_selector), or serve from a cluster of one host"
        )


def fits(labels: Mapping[str, str], label_selector: Mapping[str, str]) -> bool:
    """Whether Ray places on a node of these labels what asks for `value`, `!value`, `in(a, b)` or `!in(a, b)`.

    A node without the label has none of the values.
    """
    return all(_holds(labels.get(key), condition) for key, condition in label_selector.items())


def _holds(label: str | None, condition: str) -> bool:
    found = _CONDITION.fullmatch(condition)
    assert found is not None, "every text fits; Ray has refused what is no condition"
    several = found["several"]
    values = {found["one"]} if several is None else {value.strip() for value in several.split(",")}
    return (label in values) != bool(found["no"])
