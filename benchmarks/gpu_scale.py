"""What is large on a GPU: many epochs, a network, a catalogue. Seconds, tokens/s, share of the peak, memory.

- 160 epochs of 6,040 users with 200 positions, the network of `gpu_training`, 27,000 items and 3,706 as in that set.
- A network of 8 blocks of width 2,048 over 1,024 positions, whose activations are computed again.
- Sampled softmax of 8,192 negatives over 100,000 and over 10 million items.

`--only NAME` runs one of large, epochs, sampled; `--quick` makes all of it tiny. Without a GPU all runs on the CPU.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import (
    BEST,
    FULL,
    TINY,
    Speed,
    Way,
    bfloat16,
    flops_per_token,
    make_store,
    matmul_peak,
    run_config,
    trained,
    without_padding,
)
from benchmarks.result import Check, publish
from elasticrec.model.sampled import SampledSoftmax
from elasticrec.training.run import RunConfig

USERS, EPOCHS = 6_040, 160
LARGE = replace(
    FULL,
    width=2048,
    blocks=8,
    heads=16,
    max_length=1024,
    batch_users=32,
    steps=32,
    length=1200,
    spread=0.0,
    meet_every=4,
)
PLAIN = Way(name="bfloat16, packed", compute=bfloat16())

Part = Callable[[str, Path, bool], tuple[list[dict[str, Any]], list[Check]]]


def main() -> None:
    chosen = _options()
    parts: dict[str, Part] = {"large": large, "epochs": epochs, "sampled": sampled}
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            if not chosen.only or name in chosen.only:
                more = part(chosen.device, Path(folder) / name, chosen.quick)
                rows, checks = rows + more[0], checks + more[1]
                publish("gpu_scale", rows, checks, chosen.json)  # what is known so far


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", choices=["epochs", "large", "sampled"], action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def best_on(device: str) -> Way:
    return BEST if device != "cpu" else Way(name="no padding", compute=without_padding(), fused=False)


def epochs(device: str, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """From the end of the first step, for compilers, to the end of the last; the start beside it.

    A quarter of the epochs is run and the time taken four times.
    """
    rows = []
    for n_items in (3_706, 27_000):
        size = replace(TINY if quick else FULL, n_items=n_items, length=96, spread=1.0)
        n_users, n_epochs = (300, 10) if quick else (USERS, EPOCHS)
        store = make_store(folder / str(n_items), size, n_users)
        run = replace(run_config(best_on(device), size, folder / f"runs-{n_items}", dropout=0.2), epochs=n_epochs)
        steps = n_epochs * -(-n_users // size.batch_users)
        start_s = time.time()
        lines = measured(run, store, device, steps // 4 // size.meet_every)
        taken_s, done = lines[-1]["time"] - lines[0]["time"], (len(lines) - 1) / steps
        rows.append(
            row(f"{n_epochs} epochs of {n_users} users, {n_items} items", Speed.of(lines, size.meet_every), device)
            | {"seconds": taken_s / done, "start_s": lines[0]["time"] - start_s}
        )
        print(rows[-1], flush=True)
    return rows, [
        Check(name=row["case"], value=row["seconds"], target=45.0, unit="s", holds=row["seconds"] <= 45) for row in rows
    ]


def large(device: str, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """Floating-point operations of what is computed again do not count."""
    size = replace(TINY, length=40, spread=0.0) if quick else LARGE
    store = make_store(folder / "store", size, size.steps * size.batch_users)
    peak = matmul_peak(device, size.peak_n)
    dense = size.blocks * 11 * size.width**2
    rows = []
    for again in ("blocks", "elementwise"):
        compute = without_padding(recompute=again, **({} if device == "cpu" else {"compile": True, "capture": True}))
        run = run_config(replace(best_on(device), compute=compute), size, folder / again, dropout=0.2)
        speed = Speed.of(measured(run, store, device, size.steps // size.meet_every), size.meet_every)
        name = f"{dense / 1e6:.0f}M dense parameters, {size.max_length} positions, {again} computed again"
        share = speed.tokens_per_s * flops_per_token(size) / peak
        rows.append(row(name, speed, device) | {"share_of_bf16_peak": share})
        print(rows[-1], flush=True)
    best = max(row["share_of_bf16_peak"] for row in rows)
    name = f"{dense / 1e6:.0f}M dense parameters: share of the peak"
    return rows, [Check(name=name, value=best, target=0.4, unit="", holds=best >= 0.4)]


def sampled(device: str, folder: Path, quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """Only rows that a step touches are trained, so the size of the catalogue should hardly show."""
    rows, speeds = [], []
    for n_items in (3_000, 30_000) if quick else (100_000, 10_000_000):
        size = replace(TINY if quick else FULL, n_items=n_items, steps=40 if quick else 80, meet_every=8)
        store = make_store(folder / str(n_items), size, size.steps * size.batch_users)
        run = replace(run_config(PLAIN, size, folder / f"runs-{n_items}", dropout=0.2), loss=SampledSoftmax())
        speeds.append(Speed.of(measured(run, store, device, size.steps // size.meet_every), size.meet_every))
        rows.append(row(f"sampled softmax over {n_items} items", speeds[-1], device))
        print(rows[-1], flush=True)
    ratio = speeds[1].tokens_per_s / speeds[0].tokens_per_s
    name = "sampled softmax over 10M items against 100k"
    return rows, [Check(name=name, value=ratio, target=0.7, unit="times", holds=ratio >= 0.7)]


def measured(run: RunConfig, store: Any, device: str, meetings: int) -> list[dict[str, Any]]:
    """The journal's lines, with the memory counted anew."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return trained(run, store, device, meetings=meetings)


def row(case: str, speed: Speed, device: str) -> dict[str, Any]:
    """Columns that all cases have; a case fills in its own."""
    return {
        "case": case,
        "ms_per_step": speed.ms_per_step,
        "tokens_per_s": speed.tokens_per_s,
        "share_of_bf16_peak": None,
        "seconds": None,
        "start_s": None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0,
    }


if __name__ == "__main__":
    main()
