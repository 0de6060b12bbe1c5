"""What a step costs when the catalogue grows, and what sampled softmax gives away for it; one thread.

Each cell of the speed table is a process of its own that trains the real loop on made-up data (`data.synthetic`): the
peak of its memory is its own, and rounds over the cells take turns, so that noise meets all alike. Quality is the
validation NDCG@10 of the best epoch on a public data set, every loss with the same epochs and seeds.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.quality.sets import open_sets
from benchmarks.result import Check, publish
from elasticrec.columns import COUNT, ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, open_store, write_store
from elasticrec.data.synthetic import SyntheticConfig, generate
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.loss import FullSoftmax
from elasticrec.model.network import NetworkConfig
from elasticrec.model.sampled import AnyLoss, InBatch, LogUniform, Popularity, SampledSoftmax, Uniform
from elasticrec.training.host import LocalHost, Preempted
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import CheckpointConfig, RunConfig, ValidationConfig

SMALL, LARGE = 10_000, 1_000_000
USERS, EVENTS_PER_USER = 6_400, 100.0
LARGEST_RATIO = 1.3
DATASET = "ml-latest-small"
ROOT = Path(__file__).parents[1]


class StoppingHost(LocalHost):
    """Writes no checkpoints and ends the run after so many meetings, as if the node were about to leave."""

    def __init__(self, folder: Path, meetings: int) -> None:
        super().__init__(folder)
        self._meetings = meetings
        self.trained_bytes = 0  # peak of memory before the one checkpoint

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None: ...

    def leaving(self) -> bool:
        self._meetings -= 1
        self.trained_bytes = peak_bytes()
        return self._meetings <= 0


def peak_bytes() -> int:
    """The most memory that this process held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_store(folder: Path, n_items: int) -> Store:
    """Made-up users over a catalogue of exactly `n_items`, most popular first."""
    config = SyntheticConfig(
        users=USERS, items=n_items, mean_events=EVENTS_PER_USER, interests=min(1_000, n_items // 10), text_ids=False
    )
    log = generate(config)
    user_E, item_E = log.column(USER).to_numpy(), log.column(ITEM).to_numpy()
    count_I = np.bincount(item_E, minlength=n_items)
    index_I = np.empty(n_items, dtype=np.int32)
    index_I[np.argsort(-count_I, kind="stable")] = np.arange(1, n_items + 1)
    order_E = np.argsort(user_E, kind="stable")
    offset_U1 = np.concatenate([[0], np.cumsum(np.bincount(user_E, minlength=USERS))])
    sequences = Sequences(item_E=index_I[item_E[order_E]], offset_U1=offset_U1)
    users = pa.table({USER_INDEX: np.arange(USERS), USER: np.arange(USERS)})
    items = pa.table({ITEM_INDEX: np.arange(1, n_items + 1), ITEM: np.argsort(index_I), COUNT: np.sort(count_I)[::-1]})
    return write_store(folder, sequences, users, items, command="benchmarks.catalogue")


def train_steps(config: dict[str, Any], meetings: int) -> None:
    """Body of one cell's process: trains, and prints seconds of each step and peaks of memory."""
    run = from_mapping(RunConfig, config)
    torch.set_num_threads(1)
    host = StoppingHost(run.folder, meetings)
    with contextlib.suppress(Preempted):
        Loop(run, open_store(run.data), host).train()
    seconds = [line["seconds"] for line in read(run.folder / STEPS)]
    print(json.dumps({"seconds": seconds, "trained_bytes": host.trained_bytes, "peak_bytes": peak_bytes()}))


def measure_cell(run: RunConfig, meetings: int) -> dict[str, Any]:
    """One process of `train_steps`; the first steps warm up and are left out."""
    code = (
        f"import sys, json\nfrom benchmarks.catalogue import train_steps\ntrain_steps(json.load(sys.stdin), {meetings})"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(to_mapping(run)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    result: dict[str, Any] = json.loads(told)
    return result | {"seconds": result["seconds"][3:]}


def speed(folder: Path, rounds: int, meetings: int) -> list[dict[str, Any]]:
    """Rows: sampled softmax on both catalogues, full softmax on the small one."""
    cells: dict[tuple[str, int], AnyLoss] = {
        ("sampled", SMALL): SampledSoftmax(),
        ("sampled", LARGE): SampledSoftmax(),
        ("full", SMALL): FullSoftmax(),
    }
    for n_items in (SMALL, LARGE):
        make_store(folder / str(n_items), n_items)
    told: dict[tuple[str, int], list[dict[str, Any]]] = {cell: [] for cell in cells}
    for turn in range(rounds):
        for (name, n_items), loss in cells.items():
            name_of_run = f"{name}-{n_items}-{turn}"
            run = RunConfig(name=name_of_run, data=folder / str(n_items), storage=folder, loss=loss)
            told[name, n_items].append(measure_cell(run, meetings))
    return [_speed_row(name, n_items, results) for (name, n_items), results in told.items()]


def _speed_row(name: str, n_items: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "part": "speed",
        "loss": name,
        "items": n_items,
        "step_ms": 1e3 * statistics.median(second for result in results for second in result["seconds"]),
        "training_megabytes": max(result["trained_bytes"] for result in results) / 2**20,
        "with_checkpoint_megabytes": max(result["peak_bytes"] for result in results) / 2**20,
        "ndcg@10": None,
        "standard_error": None,
    }


def losses_of(negatives: int) -> dict[str, AnyLoss]:
    """What is compared."""
    return {
        "full": FullSoftmax(),
        "uniform": SampledSoftmax(source=Uniform(negatives=negatives)),
        "log_uniform": SampledSoftmax(source=LogUniform(negatives=negatives)),
        "popularity": SampledSoftmax(source=Popularity(negatives=negatives)),
        "in_batch": SampledSoftmax(source=InBatch()),
        "in_batch + uniform": SampledSoftmax(source=InBatch(uniform=negatives)),
        "popularity without logQ": SampledSoftmax(source=Popularity(negatives=negatives), log_q=False),
    }


def quality(store: Store, folder: Path, epochs: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Rows: the mean over seeds of the best epoch's validation NDCG@10, for each loss."""
    base = RunConfig(
        data=store.path,
        storage=folder,
        epochs=epochs,
        network=NetworkConfig(encoder=EncoderConfig(width=64, blocks=1, max_length=32)),
        plan=PlanConfig(batch_users=64),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, ema_decay=0.98),
        validation=ValidationConfig(every_epochs=3),
        checkpoint=CheckpointConfig(interval_s=1e6),
    )
    for name, loss in losses_of(store.n_items // 8).items():
        best = [train_best(dataclasses.replace(base, name=f"{name}-{seed}", loss=loss), seed) for seed in range(seeds)]
        error = statistics.stdev(best) / len(best) ** 0.5 if len(best) > 1 else None
        row = {"part": DATASET, "loss": name, "items": store.n_items, "step_ms": None}
        row |= {"training_megabytes": None, "with_checkpoint_megabytes": None}
        yield row | {"ndcg@10": statistics.mean(best), "standard_error": error}


def train_best(run: RunConfig, seed: int) -> float:
    """Validation NDCG@10 of the best epoch."""
    run = dataclasses.replace(run, plan=dataclasses.replace(run.plan, seed=seed))
    loop = Loop(run, open_store(run.data), LocalHost(run.folder))
    loop.train()
    return loop.best.value


def main() -> None:
    chosen = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = speed(folder, rounds=1 if chosen.quick else 3, meetings=2 if chosen.quick else 4)
        (dataset,) = open_sets((DATASET,), chosen.stores or folder, chosen.data)
        rows += quality(dataset.store, folder, epochs=6 if chosen.quick else 30, seeds=1 if chosen.quick else 3)
    publish("catalogue", rows, list(checks(rows)), chosen.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round and one seed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stores", type=Path, help=f"folder with a prepared store of {DATASET}")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="or with the files it is made of"
    )
    return parser.parse_args()


def checks(rows: list[dict[str, Any]]) -> Iterator[Check]:
    """The targets of the issue, and what sampling gives away."""
    step_ms = {(row["loss"], row["items"]): row["step_ms"] for row in rows if row["part"] == "speed"}
    ratio = step_ms["sampled", LARGE] / step_ms["sampled", SMALL]
    yield Check(
        name="a step on a 1M-item catalogue (sampled softmax) against one on 10k items",
        value=ratio,
        target=LARGEST_RATIO,
        unit="times",
        holds=ratio <= LARGEST_RATIO,
    )
    found = {row["loss"]: row["ndcg@10"] for row in rows if row["part"] == DATASET}
    kept = found["popularity"] / found["full"]
    yield Check(
        name="NDCG@10 of the default sampled softmax against full softmax",
        value=kept,
        target=1.0,
        unit="times",
        holds=kept >= 1,
    )


if __name__ == "__main__":
    main()
