"""The chunked softmax loss against the two separate operations of torch, forward and backward, on one thread."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result import Check, options, publish
from elasticrec.model.loss import summed_cross_entropy

TOKENS, WIDTH = 6_400, 64


def separate(query_MD: Tensor, item_ID: Tensor, target_M: Tensor) -> Tensor:
    """What one would write without thinking of the cache."""
    return F.cross_entropy(query_MD @ item_ID.t(), target_M, reduction="sum")


def measure(n_items: int, rounds: int) -> dict[str, float]:
    """Medians of both in turn, so that noise meets both alike."""
    query_MD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    item_ID = torch.randn(n_items, WIDTH, requires_grad=True)
    target_M = torch.randint(0, n_items, (TOKENS,))
    seconds: dict[str, list[float]] = {"separate": [], "chunked": []}
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "separate": separate,
        "chunked": summed_cross_entropy,
    }
    for turn in range(rounds + 1):
        for name, loss in ways.items():
            start_s = time.perf_counter()
            loss(query_MD, item_ID, target_M).backward()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start_s)
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {"items": n_items, **medians, "ratio": medians["separate_ms"] / medians["chunked_ms"]}


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = (1_682, 10_000) if chosen.quick else (1_682, 10_000, 30_000)
    rows = [measure(n_items, rounds=3 if chosen.quick else 9) for n_items in sizes]
    worst = min(row["ratio"] for row in rows)
    check = Check(name="the chunked loss is faster", value=worst, target=1.0, unit="times", holds=worst > 1)
    publish("loss", rows, [check], chosen.json)


if __name__ == "__main__":
    main()
