"""One job of the benchmark as a file in, the ranks of its model as files out. Runs in the peers' environment too.

# C cases
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elasticrec.data.sequences import Int64, Sequences, Store, open_store
from elasticrec.data.split import Cases, LeaveOneOut, SplitData, split
from elasticrec.evaluation.metrics import ndcg
from elasticrec.evaluation.ranking import EvaluationConfig, Scorer, rank

K = 10
BATCH_CASES = 256
FURTHEST = np.iinfo(np.uint16).max  # ranks are kept in 16 bits: nothing past the first K counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What one process trains and ranks."""

    dataset: str
    fingerprint: str  # of the store
    store: str
    more_tests: str | None  # npz with item_E, offset_U1: further sequences whose last item is asked for
    remove_seen: bool
    max_length: int
    epochs: int
    every_epochs: int
    patience: int
    validation_cases: int
    model: str
    setting: str
    config: dict[str, Any]  # what the model's module takes
    seed: int
    device: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.model}-{self.setting}-{self.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Cases and the sequences that they point into."""

    sequences: Sequences
    cases: Cases


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What all models get: training events, validation cases, tests by name."""

    store: Store
    cut: SplitData
    validation: Part
    tests: dict[str, Part]
    evaluation: EvaluationConfig
    max_length: int

    def ranks(self, part: Part, scorer: Scorer) -> Int64:
        """The rank of each case's answer."""
        ranking = rank(scorer, part.sequences, part.cases, self.evaluation, max_length=self.max_length, tops=False)
        return ranking.rank_C


def read_task(file: Path) -> Task:
    """The task that `write_task` wrote."""
    return Task(**json.loads(file.read_text(encoding="utf-8")))


def write_task(file: Path, task: Task) -> None:
    file.write_text(json.dumps(asdict(task), indent=2) + "\n", encoding="utf-8")


def problem_of(task: Task) -> Problem:
    """Opens and cuts the data of a task."""
    store = open_store(task.store)
    cut = split(LeaveOneOut(), store.sequences)
    validation = Part(sequences=store.sequences, cases=sample(cut.validation, task.validation_cases))
    tests = {task.dataset: Part(sequences=store.sequences, cases=cut.test)}
    if task.more_tests:
        tests[f"{task.dataset}-next"] = _last_items(Path(task.more_tests))
    evaluation = EvaluationConfig(ks=(K,), remove_seen=task.remove_seen, batch_cases=BATCH_CASES)
    return Problem(
        store=store, cut=cut, validation=validation, tests=tests, evaluation=evaluation, max_length=task.max_length
    )


def sample(cases: Cases, limit: int) -> Cases:
    """At most `limit` of the cases, always the same ones, in their order."""
    if len(cases) <= limit:
        return cases
    pick = np.sort(np.random.default_rng(0).choice(len(cases), limit, replace=False))
    return Cases(
        user_C=cases.user_C[pick], start_C=cases.start_C[pick], end_C=cases.end_C[pick], target_C=cases.target_C[pick]
    )


def _last_items(file: Path) -> Part:
    with np.load(file) as arrays:
        sequences = Sequences(item_E=arrays["item_E"], offset_U1=arrays["offset_U1"])
    start_C, end_C = sequences.offset_U1[:-1], sequences.offset_U1[1:] - 1
    return Part(
        sequences=sequences,
        cases=Cases(user_C=np.arange(len(start_C)), start_C=start_C, end_C=end_C, target_C=end_C),
    )


class Watch:
    """Validates a model after some of its epochs, keeps the best state, and says when to stop."""

    def __init__(self, task: Task, problem: Problem) -> None:
        self.task, self.problem = task, problem
        self.history: list[tuple[int, float]] = []
        self.best_epoch = 0
        self.best: Any = None
        self._start_s = time.monotonic()

    def is_due(self, epoch: int) -> bool:
        """Whether the model is validated after this epoch (the first is 1)."""
        return epoch % self.task.every_epochs == 0 or epoch == self.task.epochs

    def after(self, epoch: int, scorer: Scorer, state: Callable[[], Any]) -> bool:
        """Ranks the validation cases; true when training should end."""
        value = float(ndcg(self.problem.ranks(self.problem.validation, scorer), K).mean())
        if value > max((past for _, past in self.history), default=-1.0):
            self.best_epoch, self.best = epoch, state()
        self.history.append((epoch, value))
        print(f"epoch {epoch}: validation NDCG@{K} {value:.4f}, {time.monotonic() - self._start_s:.0f} s", flush=True)
        return sum(past > self.best_epoch for past, _ in self.history) >= self.task.patience

    def finish(self, folder: Path, scorer: Scorer, facts: dict[str, Any]) -> None:
        """Ranks the tests with the best state, which the caller has restored, and writes the outcome."""
        facts = facts | {
            "best_epoch": self.best_epoch,
            "validation": max(value for _, value in self.history),
            "history": self.history,
            "train_s": round(time.monotonic() - self._start_s, 1),
        }
        ranks = {name: self.problem.ranks(part, scorer) for name, part in self.problem.tests.items()}
        write_outcome(folder, ranks, facts)


def write_outcome(folder: Path, ranks: dict[str, Int64], facts: dict[str, Any]) -> None:
    """Writes ranks.npz and, last, outcome.json: a job with one is finished."""
    short: dict[str, Any] = {name: np.minimum(rank_C, FURTHEST).astype(np.uint16) for name, rank_C in ranks.items()}
    np.savez_compressed(folder / "ranks.npz", **short)
    partial = folder / "outcome.json.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / "outcome.json")
