"""One task in, the ranks of this project's model out: `python -m benchmarks.quality.ours FOLDER`."""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.task import K, Problem, Task, problem_of, read_task, write_outcome
from elasticrec.config import from_mapping, to_mapping
from elasticrec.model.network import Network
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.run import RunConfig


def main() -> None:
    folder = Path(sys.argv[1])
    task = read_task(folder / "task.json")
    torch.set_num_threads(task.threads)
    problem = problem_of(task)
    with tempfile.TemporaryDirectory() as storage:
        run = run_of(task, problem, Path(storage))
        loop = Loop(run, problem.store, LocalHost(Path(storage), device=task.device))
        loop.split = replace(loop.split, validation=problem.validation.cases)  # as many as the peers are validated on
        start_s = time.monotonic()
        loop.train()
        train_s = time.monotonic() - start_s
    network = Network(loop.run.network, problem.store.n_items)
    network.load_state_dict(loop.best_weights)
    network.to(task.device).eval().requires_grad_(False)
    ranks = {name: problem.ranks(part, network) for name, part in problem.tests.items()}
    validated = [(int(line["epoch"]), line[f"ndcg@{K}"]) for line in loop.history if f"ndcg@{K}" in line]
    facts: dict[str, Any] = {
        "best_epoch": loop.best.epoch,
        "validation": loop.best.value,
        "history": validated,
        "train_s": round(train_s, 1),
        "config": to_mapping(loop.run) | {"data": "", "storage": ""},
        "versions": {"torch": torch.__version__},
    }
    write_outcome(folder, ranks, facts)


def run_of(task: Task, problem: Problem, storage: Path) -> RunConfig:
    """The task's run with its seed, and with what all models are measured by."""
    run = from_mapping(RunConfig, task.config)
    return replace(
        run,
        name="quality",
        data=Path(task.store),
        storage=storage,
        epochs=task.epochs,
        plan=replace(run.plan, seed=task.seed),
        evaluation=problem.evaluation,
        validation=replace(run.validation, every_epochs=task.every_epochs, patience=task.patience),
        checkpoint=replace(run.checkpoint, interval_s=86_400.0),  # at the end alone
    )


def overridden(run: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The run with dotted keys changed, as in {"network.encoder.width": 128}."""
    mapping = to_mapping(run)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        place = mapping
        for key in path:
            place = place[key] if isinstance(place.get(key), dict) else place.setdefault(key, {})
        place[last] = value
    return from_mapping(RunConfig, mapping)


if __name__ == "__main__":
    main()
