"""The best 100 of a million and of ten million items on a GPU: by group maxima, and by torch's product and topk. ms.

Answers are compared with those of float32 products, chunk by chunk: scores place by place, and that each item has the
score that is told of it. `--quick` makes it tiny; without a GPU the torch form of the same two levels runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.result import Check, publish
from elasticrec.model.topk import GroupedTopK, Keys
from elasticrec.model.topk_sharded import ShardedTopK

WIDTH, K = 128, 100
CHUNK = 500_000  # items of the reference
CLOSE = 1e-5  # of the largest score: float32 sums in another order
BLOCKED = 50  # of the best items of each query


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A catalogue and a batch."""

    items: int
    queries: int
    integers: bool
    target_ms: float | None = None
    gpus: int = 1


CASES = [
    Case(items=1_000_000, queries=1, integers=False),
    Case(items=1_000_000, queries=32, integers=False),
    Case(items=1_000_000, queries=256, integers=False, target_ms=1.0),
    Case(items=1_000_000, queries=256, integers=True),
    Case(items=10_000_000, queries=1, integers=True),
    Case(items=10_000_000, queries=64, integers=True, target_ms=3.0),
]
TINY = [Case(items=5_000, queries=8, integers=integers, target_ms=1e3) for integers in (False, True)]
SHARDED = [(10_000_000, 64), (40_000_000, 64), (40_000_000, 256)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", default="", help="1,2,4: catalogues that are spread over so many, and nothing else")
    chosen = parser.parse_args()
    rows, checks = [], []
    with torch.inference_mode():
        for case in cases(chosen):
            row, more = measure(case, chosen.device)
            print(row, flush=True)
            rows.append(row)
            checks.extend(more)
    publish("retrieval_sharded" if chosen.gpus else "retrieval_gpu", rows, checks, chosen.json)


def cases(chosen: argparse.Namespace) -> list[Case]:
    """What is asked for."""
    if not chosen.gpus:
        return TINY if chosen.quick else CASES
    sizes = [(5_000, 8)] if chosen.quick else SHARDED
    counts = [int(count) for count in chosen.gpus.split(",")]
    return [Case(items=items, queries=queries, integers=True, gpus=gpus) for items, queries in sizes for gpus in counts]


def topk_of(keys: Keys, case: Case, device: str) -> GroupedTopK | ShardedTopK:
    """Over the case's GPUs, of which keys lie on the first."""
    if case.gpus == 1:
        return GroupedTopK(keys)
    return ShardedTopK(
        keys, [torch.device("cpu") if device == "cpu" else torch.device(device, place) for place in range(case.gpus)]
    )


def measure(case: Case, device: str) -> tuple[dict[str, Any], list[Check]]:
    keys, query_BD = draw(case, device)
    topk = topk_of(keys, case, device)
    nobody = torch.empty(0, dtype=torch.int64)
    expected_BK, item_BK = reference(query_BD, keys)
    row_N = torch.arange(case.queries).repeat_interleave(BLOCKED)
    item_N = item_BK[:, : 2 * BLOCKED : 2].flatten().cpu()

    def plain() -> tuple[Tensor, Tensor]:
        return topk.top(query_BD, K, nobody, nobody)

    def blocked() -> tuple[Tensor, Tensor]:
        return topk.top(query_BD, K, row_N, item_N)

    deviation = max(
        differs(plain(), expected_BK, query_BD, keys),
        differs(blocked(), reference(query_BD, keys, row_N, item_N)[0], query_BD, keys),
    )
    ms = milliseconds(plain, device)
    row = {
        "items": case.items,
        "gpus": case.gpus,
        "batch": case.queries,
        "keys": "int8" if case.integers else "bfloat16",
        "ms": ms,
        "ms_50_blocked": milliseconds(blocked, device),
        "ms_product_and_topk": None if case.integers else milliseconds(lambda: by_torch(query_BD, keys), device),
        "largest_deviation": deviation,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0,
    }
    name = f"best {K} of {case.items} x {WIDTH} {row['keys']}, batch {case.queries}" + (
        f", {case.gpus} GPUs" if case.gpus > 1 else ""
    )
    checks = [Check(name=f"{name}: deviation", value=deviation, target=CLOSE, unit="", holds=deviation <= CLOSE)]
    if case.target_ms is not None:
        checks.append(Check(name=name, value=ms, target=case.target_ms, unit="ms", holds=ms < case.target_ms))
    return row, checks


def draw(case: Case, device: str) -> tuple[Keys, Tensor]:
    """Random keys, the padding row among them, and queries."""
    torch.manual_seed(case.items + case.queries)
    query_BD = torch.randn(case.queries, WIDTH, device=device).to(torch.bfloat16)
    if not case.integers:
        return Keys(key_ID=torch.randn(case.items + 1, WIDTH, device=device).to(torch.bfloat16)), query_BD
    key_ID = torch.randint(-127, 128, (case.items + 1, WIDTH), dtype=torch.int8, device=device)
    return Keys(key_ID=key_ID, scale_I=0.5 + torch.rand(case.items + 1, device=device)), query_BD


def reference(
    query_BD: Tensor, keys: Keys, row_N: Tensor | None = None, item_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and items of float32 products, the best of each chunk and then of all."""
    torch.backends.cuda.matmul.allow_tf32 = False
    scores, items = [], []
    for begin in range(0, len(keys.key_ID), CHUNK):
        score_Bi = query_BD.float() @ keys.key_ID[begin : begin + CHUNK].float().t()
        if keys.scale_I is not None:
            score_Bi *= keys.scale_I[begin : begin + CHUNK]
        if begin == 0:
            score_Bi[:, 0] = float("-inf")
        if row_N is not None and item_N is not None:
            here_N = (item_N >= begin) & (item_N < begin + score_Bi.shape[1])
            score_Bi[row_N[here_N], item_N[here_N] - begin] = float("-inf")
        top = score_Bi.topk(min(K, score_Bi.shape[1]))
        scores.append(top.values)
        items.append(top.indices + begin)
    best_BK = torch.cat(scores, dim=1).topk(K)
    return best_BK.values, torch.cat(items, dim=1).gather(1, best_BK.indices)


def differs(found: tuple[Tensor, Tensor], expected_BK: Tensor, query_BD: Tensor, keys: Keys) -> float:
    """The largest deviation relative to the largest score: from the reference, and from the items' own scores.

    Infinite where an item comes twice. So what is left may differ in ties alone.
    """
    item_BK, score_BK = found
    if any(len(item_K.unique()) < len(item_K) for item_K in item_BK):
        return float("inf")
    own_BK = torch.einsum("bd,bkd->bk", query_BD.double(), keys.key_ID[item_BK].double())
    if keys.scale_I is not None:
        own_BK *= keys.scale_I[item_BK]
    far = torch.maximum((score_BK - expected_BK).abs().max(), (score_BK - own_BK).abs().max())
    return float(far / expected_BK.abs().max())


def by_torch(query_BD: Tensor, keys: Keys) -> Any:
    """The product, rounded to bfloat16, and its best: without the padding row, so that rows stay aligned."""
    return (query_BD @ keys.key_ID[1:].t()).topk(K)


def milliseconds(work: Callable[[], Any], device: str) -> float:
    """The median of 50 calls, each waited for."""
    wait: Callable[[], None] = torch.cuda.synchronize if device != "cpu" else lambda: None
    seconds = []
    for _ in range(60):
        wait()
        start_s = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(seconds[10:])


if __name__ == "__main__":
    main()
