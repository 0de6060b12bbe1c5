"""A dashboard in, the nodes that are alive out."""

import contextlib
import time
from pathlib import Path
from typing import Any

import httpx


def alive_nodes(dashboard: str, token: str) -> list[dict[str, Any]]:
    url = f"{dashboard}/api/v0/nodes?detail=1"
    with contextlib.suppress(httpx.HTTPError, ValueError):
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        if answer.status_code == 200:
            return [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
    return []


def wait_for_nodes(
    count: int, dashboard: str, token: str, logs: list[Path], within_s: float = 90
) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + within_s
    while len(nodes := alive_nodes(dashboard, token)) != count:
        assert time.monotonic() < deadline_s, "\n".join(log.read_text(encoding="utf-8") for log in logs)
        time.sleep(0.2)
    return nodes
