"""A training step on a GPU under Ray Train against a bare loop of the same passes without Ray: ms a step, tokens/s.

The bare loop is what one would write: batches made ahead, the captured pass, optimizer, averaged weights; no counts,
no journal, no checkpoint. Every 32 steps both wait for what the device was given 8 steps before. They take turns, each
time in a process of their own, as kernels and memory that a process has already make the next training in it faster;
each stretch of 32 steps is compared with the one of the same batches in the other loop. Needs Ray; `--quick` makes it
tiny.
"""

import argparse
import concurrent.futures
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_scale import best_on
from benchmarks.gpu_training import FULL, TINY, make_store, run_config, stretches
from benchmarks.result import Check, publish
from elasticrec.cli.connection import connected
from elasticrec.data.plan import Plan
from elasticrec.data.sequences import open_store
from elasticrec.data.split import split
from elasticrec.model.loss import SummedLoss
from elasticrec.model.network import Network
from elasticrec.training import compute
from elasticrec.training.feed import Cut, Feed
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import steps_ahead
from elasticrec.training.optimizer import AveragedWeights, learning_rate, make_optimizer
from elasticrec.training.run import ElasticConfig, RunConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.protocol import Tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    size = TINY if chosen.quick else FULL
    rounds = 1 if chosen.quick else chosen.rounds
    found: dict[str, list[list[tuple[float, int]]]] = {"bare loop": [], "Ray Train": []}
    with tempfile.TemporaryDirectory() as folder, connected(train_slots=1):
        path = Path(folder) / "store"
        make_store(path, size, size.steps * size.batch_users)
        run = run_config(best_on(chosen.device), size, Path(folder) / "runs", dropout=0.2)
        elastic = ElasticConfig(max_workers=1, gpus_per_worker=0.0 if chosen.device == "cpu" else 1.0)
        for turn in range(rounds):
            own = replace(run, name=str(turn), data=path, elastic=elastic)
            found["bare loop"].append(stretches(alone(own, chosen.device), size.meet_every))
            found["Ray Train"].append(stretches(under_ray(own), size.meet_every))
            tell(found, size.meet_every, chosen.json)


def tell(found: dict[str, list[list[tuple[float, int]]]], meet_every: int, file: Path | None) -> None:
    """What is known after a round, of the seconds and tokens of each loop's stretches."""
    rows = [
        {
            "loop": name,
            "ms_per_step": 1e3 * statistics.median(seconds for turn in turns for seconds, _ in turn) / meet_every,
            "tokens_per_s": sum(tokens for turn in turns for _, tokens in turn)
            / sum(s for turn in turns for s, _ in turn),
            "rounds": len(turns),
            "stretches": sum(map(len, turns)),
        }
        for name, turns in found.items()
    ]
    slower = 100 * (statistics.median(ratios(found["bare loop"], found["Ray Train"])) - 1)
    name = "Ray Train against the bare loop: slower by"
    publish("gpu_ray", rows, [Check(name=name, value=slower, target=2.0, unit="%", holds=slower <= 2)], file)


def ratios(bare: list[list[tuple[float, int]]], ray: list[list[tuple[float, int]]]) -> list[float]:
    """Of the seconds of the same stretch; both loops had the same batches."""
    pairs = [pair for turns in zip(bare, ray, strict=True) for pair in zip(*turns, strict=True)]
    assert all(one[1] == other[1] for one, other in pairs), "the loops had different batches"
    return [other[0] / one[0] for one, other in pairs]


def under_ray(run: RunConfig) -> list[dict[str, Any]]:
    """The journal's lines of a run that Ray Train starts."""
    from elasticrec.training.driver import fit

    fit(run)
    return read(run.folder / STEPS)


def alone(run: RunConfig, device: str) -> list[dict[str, Any]]:
    """The bare loop in a new process, as Ray Train's worker is one."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(bare, run, device).result()


def bare(run: RunConfig, device: str) -> list[dict[str, Any]]:
    """When each step ended, and its tokens; in the form of the journal."""
    store = open_store(run.data)
    encoder, place = run.network.encoder, torch.device(device)
    plan = Plan(run.plan, store.sequences, split(run.split, store.sequences), encoder.max_length, encoder.inputs)
    torch.manual_seed(run.plan.seed)
    network = Network(run.network, store.n_items).to(place)
    loss = SummedLoss(network, run.loss)
    compute.apply(run.compute, loss, place)
    optimizer, averaged = make_optimizer(run.optimizer, network), AveragedWeights(network, run.optimizer.ema_decay)
    cuts, lines = [Cut(0, tuple(range(run.plan.shards)))], []
    assert isinstance(run.sync, AllReduce)
    feed = Feed(plan, compute.shapes(run.compute, place), plan.steps_per_epoch)
    with feed, run.sync.attach(loss, optimizer) as attached:
        link = compute.capture(run.compute, attached, loss, 1)
        done: torch.cuda.Event | None = None
        for step in range(plan.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.optimizer, step, plan.steps_per_epoch)
            (piece,) = feed.take(step, cuts)
            link.accumulate(piece.batch, Tokens(step=piece.tokens, worker=piece.tokens), last=True)
            link.step()
            averaged.update(network, step)
            lines.append({"tokens": piece.tokens, "time": time.time()})
            if (step + 1) % run.sync.meet_every == 0 and place.type == "cuda":
                done = torch.cuda.Event()
                done.record()
            if done is not None and (step + 1) % run.sync.meet_every == steps_ahead(run.sync.meet_every, place):
                done.synchronize()
    return lines


if __name__ == "__main__":
    main()
