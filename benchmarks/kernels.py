"""Kernels of a profile in, what a step's time on a GPU goes to out, by kind. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

# In this order: the first that a kernel's name matches is its kind.
KINDS: Final = {
    "attention": r"^_forward$|^_backward_(queries|keys|bias)$|flash|fmha|attention",  # ours: model/jagged.py
    "messages between GPUs": r"nccl",
    "matrix products": r"gemm|nvjet|cutlass|cublas|matmul|_mm_|splitk",
    "softmax and loss": r"^_row$|softmax|cross_entropy|logsumexp|nll",  # ours: model/softmax_triton.py
    "optimizer and averaged weights": r"adam|multi_tensor_apply|foreach|lerp",
    "random numbers": r"distribution|random|philox|dropout|bernoulli|rand",
    "copies": r"memcpy|memset|copy",
    "indexing": r"index|gather|scatter|embedding|sort|radix",
}
REST: Final = "elementwise and norms"
Kernel = tuple[str, float, int]  # name, microseconds of all calls, calls


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), REST)


def kernel_rows(kernels: Iterable[Kernel], steps: int, ms_per_step: float) -> list[dict[str, Any]]:
    """A row for each kind, the largest first, and one for the time in which no kernel runs.

    Args:
        steps: that were profiled.
        ms_per_step: of a step without a profiler, which slows its host down.
    """
    us_of, calls_of, most = defaultdict[str, float](float), defaultdict[str, int](int), dict[str, Kernel]()
    for kernel in kernels:
        name, took_us, calls = kernel
        kind = kind_of(name)
        us_of[kind] += took_us
        calls_of[kind] += calls
        most[kind] = max(most.get(kind, kernel), kernel, key=lambda one: one[1])
    rows = [
        _row(kind, took_us / 1e3 / steps, calls_of[kind] / steps, ms_per_step, most[kind][0])
        for kind, took_us in sorted(us_of.items(), key=lambda pair: -pair[1])
    ]
    idle_ms = max(0.0, ms_per_step - sum(row["ms_per_step"] for row in rows))
    return [*rows, _row("no kernel", idle_ms, 0.0, ms_per_step, "")]


def _row(kind: str, ms: float, calls: float, ms_per_step: float, largest: str) -> dict[str, Any]:
    share = ms / ms_per_step if ms_per_step else 0.0
    return {"kind": kind, "ms_per_step": ms, "share": share, "calls_per_step": calls, "largest": largest[:80]}
