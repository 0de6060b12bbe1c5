"""Training steps on a GPU, one way of computing them after the other: tokens/s, ms, share of the peak, memory.

The network of the design: width 256, 4 blocks, 200 positions, 128 users a step, over synthetic histories of 27,000
items whose lengths are spread as in public sets of 20 and of 1 million film ratings. `--check` instead compares loss
curves: those of the device with the one of the CPU in float32. `--listing FILE` lists the kernels of the fastest way,
and FILE with the ending .json says by kind what a step's time goes to.
Without a GPU all runs on the CPU; `--quick` makes it tiny.
"""

import argparse
import contextlib
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.kernels import Kernel, kernel_rows
from benchmarks.result import Check, publish
from elasticrec.columns import COUNT, ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.loss import FullSoftmax
from elasticrec.model.network import NetworkConfig
from elasticrec.training.compute import ComputeConfig
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig
from elasticrec.training.sync.all_reduce import AllReduce

MEET_EVERY = 32  # steps between two moments at which the host waits for the device
WARM_UP = 2  # meetings, in which compilers work
PROFILE_FROM = 8  # meetings
NEVER = 1_000_000
CURVE_STEPS = 50
DEVIATION = 0.02  # of the loss, relative


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of the network and of its data."""

    width: int
    blocks: int
    heads: int
    max_length: int
    batch_users: int
    n_items: int
    steps: int
    peak_n: int  # rows of the matrices whose product gives the peak
    length: int = 68  # the median history, as among 20 million film ratings
    spread: float = 1.1  # of its logarithm
    least: int = 20
    meet_every: int = MEET_EVERY


FULL = Size(width=256, blocks=4, heads=8, max_length=200, batch_users=128, n_items=27_000, steps=320, peak_n=8192)
TINY = Size(width=32, blocks=1, heads=2, max_length=16, batch_users=16, n_items=300, steps=40, peak_n=256, meet_every=8)
SMALL = Size(width=64, blocks=2, heads=2, max_length=50, batch_users=64, n_items=2_000, steps=CURVE_STEPS, peak_n=1024)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to compute a step."""

    name: str
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    packed: bool = True
    fused: bool = False
    flex: bool = False
    jagged: bool = False
    gpu_only: bool = False


def bfloat16(**options: Any) -> ComputeConfig:
    return ComputeConfig(precision="bfloat16", **options)


def without_padding(**options: Any) -> ComputeConfig:
    return bfloat16(bucket_tokens=1024, ahead=2, **options)


BEST = Way(
    name="bfloat16, no padding, compiled, captured",
    compute=without_padding(compile=True, capture=True),
    fused=True,
    jagged=True,
    gpu_only=True,
)
WAYS = [
    Way(name="float32, packed"),
    Way(name="bfloat16, packed", compute=bfloat16()),
    Way(name="bfloat16, padded, fused loss", compute=bfloat16(), packed=False, fused=True),
    Way(name="bfloat16, padded, compiled", compute=bfloat16(compile=True), packed=False, fused=True),
    Way(
        name="bfloat16, padded, compiled, graphs",
        compute=bfloat16(compile=True, graphs=True, ahead=2),
        packed=False,
        fused=True,
        gpu_only=True,
    ),
    Way(name="bfloat16, no padding, launched", compute=without_padding(), fused=True, jagged=True),
    replace(BEST, name="bfloat16, no padding, captured", compute=without_padding(capture=True)),
    BEST,
]


def main() -> None:
    chosen = _options()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.check:
            rows, checks = compare(chosen.device, Path(folder))
        else:
            size = TINY if chosen.quick else FULL
            rows, checks = measure(chosen.device, size, Path(folder), chosen.listing)
    publish("gpu_training", rows, checks, chosen.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--check", action="store_true", help=f"compare loss curves of {CURVE_STEPS} steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--listing", type=Path, help="where to list the kernels of the fastest way")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def ways_on(device: str) -> list[Way]:
    """A CPU runs those that it can, and compiles once: its compiler takes minutes."""
    if device != "cpu":
        return WAYS
    plain = [way for way in WAYS if not way.gpu_only and not way.compute.compile]
    return [*plain, next(way for way in WAYS if way.compute.compile)]


def make_store(folder: Path, size: Size, n_users: int) -> Store:
    """Walks of random strides through items of Zipf's popularity: something to learn, of the right lengths."""
    generator = np.random.default_rng(0)
    length_U = np.clip(np.exp(generator.normal(np.log(size.length), size.spread, n_users)), size.least, 2000).astype(
        np.int64
    )
    offset_U1 = np.concatenate([[0], np.cumsum(length_U)])
    start_E = np.repeat((generator.pareto(1.0, n_users) * 20).astype(np.int64), length_U)
    stride_E = np.repeat(generator.integers(1, 4, n_users), length_U)
    within_E = np.arange(offset_U1[-1]) - np.repeat(offset_U1[:-1], length_U)
    item_E = ((start_E + stride_E * within_E) % size.n_items + 1).astype(np.int32)
    count_I = np.bincount(item_E, minlength=size.n_items + 1)
    users = pa.table({USER_INDEX: np.arange(n_users), USER: np.arange(n_users).astype(str)})
    items = pa.table({ITEM_INDEX: np.arange(1, size.n_items + 1), ITEM: np.arange(size.n_items), COUNT: count_I[1:]})
    return write_store(folder, Sequences(item_E=item_E, offset_U1=offset_U1), users, items, command="benchmark")


def run_config(way: Way, size: Size, storage: Path, dropout: float) -> RunConfig:
    """One epoch, without a validation until its end."""
    block = BlockConfig(heads=size.heads, attention="jagged" if way.jagged else "flex" if way.flex else "sdpa")
    encoder = EncoderConfig(
        width=size.width,
        blocks=size.blocks,
        max_length=size.max_length,
        dropout=dropout,
        block=block,
        packed=way.packed,
    )
    return RunConfig(
        storage=storage,
        epochs=1,
        network=NetworkConfig(encoder=encoder),
        loss=FullSoftmax(fused=way.fused),
        plan=PlanConfig(batch_users=size.batch_users),
        optimizer=OptimizerConfig(warmup_steps=10),
        sync=AllReduce(meet_every=size.meet_every),
        validation=ValidationConfig(every_epochs=NEVER),
        checkpoint=CheckpointConfig(interval_s=NEVER),
        compute=way.compute,
        elastic=ElasticConfig(max_workers=1, gpus_per_worker=float(way.compute.graphs or way.compute.capture)),
    )


class Measured(Exception):  # noqa: N818 - what happened, and no error
    """Enough steps were taken."""


class Watch(LocalHost):
    """Ends training at a meeting, without writing a checkpoint; lists the kernels between two meetings before that."""

    meetings = 0
    last_meeting = NEVER
    listing: Path | None = None
    kernels: tuple[Kernel, ...] = ()

    def leaving(self) -> bool:
        self.meetings += 1
        if self.listing is not None and self.meetings == PROFILE_FROM:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        elif self.listing is not None and self.meetings == PROFILE_FROM + 1:
            torch.cuda.synchronize()
            self._profile.stop()
            found = self._profile.key_averages()
            self.listing.write_text(found.table(sort_by="cuda_time_total", row_limit=50), encoding="utf-8")
            self.kernels = tuple((one.key, one.self_device_time_total, one.count) for one in found)
        if self.meetings >= self.last_meeting:
            raise Measured
        return False


def trained(run: RunConfig, store: Store, device: str, *, meetings: int = NEVER) -> list[dict[str, Any]]:
    """The journal's lines of all steps, or of those before so many meetings."""
    _train(run, store, device, meetings)
    return read(run.folder / STEPS)


def _train(run: RunConfig, store: Store, device: str, meetings: int, listing: Path | None = None) -> Watch:
    torch.compiler.reset()
    host = Watch(run.folder, device=device)
    host.last_meeting, host.listing = meetings, listing
    with contextlib.suppress(Measured):
        Loop(run, store, host).train()
    return host


def measure(
    device: str, size: Size, folder: Path, listing: Path | None = None
) -> tuple[list[dict[str, Any]], list[Check]]:
    """A row for each way; one that fails says so and the others go on."""
    store = make_store(folder / "20M", size, size.steps * size.batch_users)
    peak = matmul_peak(device, size.peak_n)
    ways = ways_on(device)
    rows = [attempted(way, size, store, device, peak, folder / way.name) for way in ways]
    shorter = replace(size, length=96, spread=1.0)
    rows.append(
        attempted(
            replace(ways[-1], name=f"{ways[-1].name}; as of 1M ratings"),
            shorter,
            make_store(folder / "1M", shorter, 6040),
            device,
            peak,
            folder / "runs-1M",
        )
    )
    if listing is not None:
        run = run_config(ways[-1], size, folder / "listed", dropout=0.2)
        kernels = _train(run, store, device, PROFILE_FROM + 2, listing).kernels
        of_kind = kernel_rows(kernels, size.meet_every, rows[len(ways) - 1]["ms_per_step"])
        publish("gpu_training", of_kind, [], listing.with_suffix(".json"))
    ran = sum(not row["failed"] for row in rows)
    best = rows[len(ways) - 1]["tokens_per_s"]
    return rows, [
        Check(name="tokens/s of the fastest way", value=best, target=1.2e6, unit="tokens/s", holds=best >= 1.2e6),
        Check(name="ways that run", value=ran, target=len(rows), unit="", holds=ran == len(rows)),
    ]


def attempted(way: Way, size: Size, store: Store, device: str, peak: float, storage: Path) -> dict[str, Any]:
    """A row, whatever happens."""
    try:
        row = _row(way, size, store, device, peak, storage)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        row = _failed(way, f"{type(error).__name__}: {error}")
    print(row, flush=True)
    gc.collect()
    return row


def _row(way: Way, size: Size, store: Store, device: str, peak: float, storage: Path) -> dict[str, Any]:
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start_s = time.time()
    epochs = -(-size.steps * size.batch_users // (len(store.sequences.offset_U1) - 1))
    run = replace(run_config(way, size, storage, dropout=0.2), epochs=epochs)
    lines = trained(run, store, device, meetings=size.steps // size.meet_every)
    speed = Speed.of(lines, size.meet_every)
    return {
        "way": way.name,
        "ms_per_step": speed.ms_per_step,
        "tokens_per_s": speed.tokens_per_s,
        "share_of_bf16_peak": speed.tokens_per_s * flops_per_token(size) / peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0,
        "first_step_s": lines[0]["time"] - start_s,
        "last_loss": lines[-1]["loss"],
        "failed": "",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Medians over the stretches between two meetings, after the warm-up."""

    ms_per_step: float
    tokens_per_s: float

    @classmethod
    def of(cls, lines: list[dict[str, Any]], meet_every: int) -> "Speed":
        found = stretches(lines, meet_every)
        return cls(
            ms_per_step=1e3 * statistics.median(seconds for seconds, _ in found) / meet_every,
            tokens_per_s=statistics.median(tokens / seconds for seconds, tokens in found),
        )


def stretches(lines: list[dict[str, Any]], meet_every: int) -> list[tuple[float, int]]:
    """Seconds and tokens from meeting to meeting, without the warm-up."""
    # The host is as far ahead of the device at each first step after a meeting, so such lines bound whole steps.
    bounds = range(WARM_UP * meet_every, len(lines), meet_every)
    return [
        (lines[end]["time"] - lines[begin]["time"], sum(line["tokens"] for line in lines[begin + 1 : end + 1]))
        for begin, end in itertools.pairwise(bounds)
    ]


def _failed(way: Way, why: str) -> dict[str, Any]:
    numbers = ("ms_per_step", "tokens_per_s", "share_of_bf16_peak", "peak_gb", "first_step_s", "last_loss")
    return {"way": way.name, **dict.fromkeys(numbers, 0.0), "failed": why[:200]}


def flops_per_token(size: Size) -> float:
    """Forward and backward of a token that is no padding, with attention to half the window, and the loss."""
    layer = 4 * size.width**2 + size.width**2 + 6 * size.width**2  # q k v u; out; SwiGLU of twice the width
    attention = 2 * size.width * size.max_length / 2
    return 6.0 * (size.blocks * (layer + attention) + size.n_items * size.width)


def matmul_peak(device: str, n: int) -> float:
    """FLOP/s of a bfloat16 product of random (n, n) matrices, the median of ten."""
    one, other = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait: Callable[[], None] = torch.cuda.synchronize if device != "cpu" else lambda: None
    seconds = []
    for _ in range(13):
        wait()
        start_s = time.perf_counter()
        one @ other
        wait()
        seconds.append(time.perf_counter() - start_s)
    return 2.0 * n**3 / statistics.median(seconds[3:])


def compare(device: str, folder: Path) -> tuple[list[dict[str, Any]], list[Check]]:
    """Loss curves without dropout, whose masks differ between devices; the deviation is the largest of all steps."""
    store = make_store(folder / "store", SMALL, CURVE_STEPS * SMALL.batch_users)
    expected = _losses(Way(name="CPU, float32"), store, "cpu")
    rows, checks = [], []
    for way in [replace(way, name=f"{device}, {way.name}") for way in ways_on(device)]:
        try:
            losses = _losses(way, store, device)
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises
            losses = np.full(len(expected), np.nan)
            print(f"{way.name} failed: {error}", flush=True)
        deviation = float(np.max(np.abs(losses / expected - 1)))
        last = float(losses[-1] / expected[-1] - 1)
        rows.append({"way": way.name, "largest_deviation": deviation, "last_deviation": last, "last_loss": losses[-1]})
        name = f"loss curve of {CURVE_STEPS} steps against the CPU in float32: {way.name}"
        checks.append(
            Check(name=name, value=deviation, target=DEVIATION, unit="relative", holds=deviation <= DEVIATION)
        )
    return rows, checks


def _losses(way: Way, store: Store, device: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    with tempfile.TemporaryDirectory() as storage:
        run = run_config(way, SMALL, Path(storage), dropout=0.0)
        return np.array([line["loss"] for line in trained(run, store, device)])


if __name__ == "__main__":
    main()
