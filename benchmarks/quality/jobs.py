"""Tasks in, a process each, N at a time; what each wrote, or why it failed, out."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality.task import Task, read_task, write_task

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A task, the module that does it, and the interpreter that runs the module."""

    task: Task
    module: str
    python: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A finished job, or a failed one with its reason."""

    task: Task
    failure: str = ""
    outcome: dict[str, Any]
    ranks: dict[str, npt.NDArray[np.uint16]]


def run_all(jobs: Sequence[Job], work: Path, *, parallel: int, deadline_s: float) -> list[Done]:
    """Runs what is not finished under `work` yet; a failed job does not stop the others."""
    end_s = time.monotonic() + deadline_s
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(lambda job: _run(job, work / job.task.name, end_s), jobs))


def _run(job: Job, folder: Path, end_s: float) -> Done:
    if is_finished(job.task, folder):
        return _read(job.task, folder)
    start_s = time.monotonic()
    if start_s >= end_s:
        return _failed(job.task, "not started before the deadline")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    write_task(folder / "task.json", job.task)
    failure = _process(job, folder, end_s - start_s)
    print(f"{job.task.name}: {failure or 'done'}, {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    return _failed(job.task, failure) if failure else _read(job.task, folder)


def is_finished(task: Task, folder: Path) -> bool:
    """Whether the folder holds the outcome of this very task, on whatever device and threads."""
    if not (folder / "outcome.json").exists():
        return False
    there, wanted = asdict(read_task(folder / "task.json")), asdict(task)
    places = ("device", "threads", "store", "more_tests")
    return all(there.get(key) == value for key, value in wanted.items() if key not in places)


def _process(job: Job, folder: Path, limit_s: float) -> str:
    """Runs the job; empty, or what went wrong."""
    threads = str(job.task.threads)
    paths = [str(ROOT / "platform"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                [job.python, "-m", job.module, str(folder)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "not finished before the deadline"
        except OSError as error:
            return f"'{job.python}' does not start: {error}"
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} (status {done.returncode})" if done.returncode else ""


def _read(task: Task, folder: Path) -> Done:
    with np.load(folder / "ranks.npz") as arrays:
        ranks = {name: arrays[name] for name in arrays.files}
    return Done(task=task, outcome=json.loads((folder / "outcome.json").read_text(encoding="utf-8")), ranks=ranks)


def _failed(task: Task, failure: str) -> Done:
    return Done(task=task, failure=failure, outcome={}, ranks={})


def longest_first(jobs: Sequence[Job], cost: Callable[[Job], float]) -> list[Job]:
    """Starts long jobs first, so that no long one is left alone at the end."""
    return sorted(jobs, key=cost, reverse=True)
