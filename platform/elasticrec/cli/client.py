"""A service's URL and key in; answers, and how long they took, out."""

import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import httpx
import numpy as np

from elasticrec.cli.web import connect

WARM_UP = 30


class Client:
    """One connection to a service."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        self._http = connect(base_url=url, headers=headers, timeout=10)

    def recommend(self, user_id: str, k: int = 10) -> httpx.Response:
        return self._http.post("/v1/recommend", json={"user_id": user_id, "k": k})

    def add_event(self, user_id: str, item_id: str) -> httpx.Response:
        return self._http.post("/v1/events", json={"events": [{"user_id": user_id, "item_id": item_id}]})

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()


def time_requests(
    client: Client, users: Sequence[str], requests: int, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Asks for random users one after the other: requests, failed, p50_ms, p99_ms, latencies_ms."""
    choose = random.Random(0)
    for _ in range(WARM_UP):
        client.recommend(choose.choice(users))
    latencies_ms, failed = [], 0
    for _ in range(requests):
        user = choose.choice(users)
        start_s = time.perf_counter()
        failed += not _succeeds(client, user)
        latencies_ms.append(1e3 * (time.perf_counter() - start_s))
        advance(1)
    p50_ms, p99_ms = np.percentile(latencies_ms, [50, 99])
    return {
        "requests": requests,
        "failed": failed,
        "p50_ms": float(p50_ms),
        "p99_ms": float(p99_ms),
        "latencies_ms": [round(value, 3) for value in latencies_ms],
    }


def changes_by_event(client: Client, user: str) -> bool:
    """Whether an event with the best item takes that item out of the next answer and changes the rest of it."""
    before = _item_ids(client.recommend(user))
    client.add_event(user, before[0]).raise_for_status()
    after = _item_ids(client.recommend(user))
    return before[0] not in after and after[: len(before) - 1] != before[1:]


def _succeeds(client: Client, user: str) -> bool:
    try:
        return client.recommend(user).status_code == 200
    except httpx.HTTPError:
        return False


def _item_ids(answer: httpx.Response) -> list[str]:
    return [item["item_id"] for item in answer.raise_for_status().json()["items"]]
