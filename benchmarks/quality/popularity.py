"""One task in, the ranks of the most popular items out: `python -m benchmarks.quality.popularity FOLDER`."""

import sys
from pathlib import Path

from benchmarks.quality.task import Watch, problem_of, read_task
from elasticrec.evaluation.baselines import FixedOrder, popularity


def main() -> None:
    folder = Path(sys.argv[1])
    task = read_task(folder / "task.json")
    problem = problem_of(task)
    order = popularity(problem.store.sequences, problem.cut, problem.store.n_items)
    scorer = FixedOrder(order.score_I.to(task.device))
    watch = Watch(task, problem)
    watch.after(1, scorer, lambda: None)
    watch.finish(folder, scorer, {"versions": {}})


if __name__ == "__main__":
    main()
