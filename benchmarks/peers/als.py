"""One task in, the ranks of implicit's ALS out: `python -m benchmarks.peers.als FOLDER`, in the peers' environment.

An epoch is one alternation. A case's user vector is solved from all events that the case may see, so that the event
between training and test counts for ALS too. Repeated events add up.
"""

import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from implicit.cpu.als import AlternatingLeastSquares  # type: ignore[import-not-found,unused-ignore]
from scipy.sparse import csr_matrix  # type: ignore[import-untyped,unused-ignore]

from benchmarks.quality.task import Problem, Watch, problem_of, read_task
from elasticrec.model.history import History


def main() -> None:
    folder = Path(sys.argv[1])
    task = read_task(folder / "task.json")
    problem = whole(problem_of(task))
    model = AlternatingLeastSquares(random_state=task.seed, num_threads=task.threads, **task.config)
    train = training_counts(problem)
    scorer = FoldIn(model, task.device)
    watch = Watch(task, problem)
    for epoch in range(1, task.epochs + 1):
        model.iterations = 1  # goes on from the factors it has
        model.fit(train, show_progress=False)
        if watch.is_due(epoch) and watch.after(epoch, scorer, model.item_factors.copy):
            break
    model.item_factors = watch.best
    model._YtY = None  # the cache of the factors just replaced
    watch.finish(folder, scorer, facts(task.config))


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What the result says of the peer."""
    return {"config": config, "versions": {name: version(name) for name in ("pm-implicit", "numpy")}}


@dataclass(frozen=True, slots=True)
class FoldIn:
    """Solves the user vectors of a batch from their histories and multiplies."""

    model: Any
    device: str

    def scores(self, history: History) -> torch.Tensor:
        """Whole histories (see `whole`) -> float (B, I)."""
        item_BT = history.item_BT.numpy()
        row_S, column_S = item_BT.nonzero()
        seen = ones(row_S, item_BT[row_S, column_S], (len(item_BT), len(self.model.item_factors)))
        user_BD = torch.from_numpy(self.model.recalculate_user(np.arange(len(item_BT)), seen))
        return user_BD.to(self.device) @ torch.from_numpy(self.model.item_factors).to(self.device).t()


def whole(problem: Problem) -> Problem:
    """The problem with all events of a history shown: there is no window in ALS."""
    longest = max(
        int((part.cases.end_C - part.cases.start_C).max()) for part in (problem.validation, *problem.tests.values())
    )
    return replace(problem, max_length=longest)


def training_counts(problem: Problem) -> csr_matrix:
    """How often each user's training events hold each item: float32 (U, I); column 0 pads and stays empty."""
    start_U, length_U = problem.cut.train_start_U, problem.cut.train_end_U - problem.cut.train_start_U
    row_S = np.repeat(np.arange(len(start_U)), length_U)
    within_S = np.arange(len(row_S)) - np.repeat(np.cumsum(length_U) - length_U, length_U)
    item_S = problem.store.sequences.item_E[np.repeat(start_U, length_U) + within_S]
    return ones(row_S, item_S, (len(start_U), problem.store.n_items + 1))


def ones(row_S: Any, column_S: Any, shape: tuple[int, int]) -> csr_matrix:
    """A matrix that counts how often each place is named."""
    return csr_matrix((np.ones(len(row_S), dtype=np.float32), (row_S, column_S)), shape=shape)


if __name__ == "__main__":
    main()
