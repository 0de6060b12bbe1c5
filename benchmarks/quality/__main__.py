"""Options in, the table of all models on all sets out; the package's docstring says how."""

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers.environment import peers_python
from benchmarks.quality.jobs import Done, Job, longest_first, run_all
from benchmarks.quality.models import OURS, Entry, entries
from benchmarks.quality.ours import overridden
from benchmarks.quality.sets import MAKERS, Dataset, open_sets
from benchmarks.quality.table import best_setting, by, tables
from benchmarks.quality.task import Task
from benchmarks.result import publish
from elasticrec.training.recipe import recommended

ROOT = Path(__file__).parents[2]
MODELS = ("popularity", "implicit-als", "rectools-sasrec", "rectools-hstu", OURS)
QUICK = {"network.encoder.width": 32, "network.encoder.max_length": 20, "network.encoder.block.heads": 1}
NO_LIMIT_S = 7 * 86_400.0
SLOWNESS = {"popularity": 0.0, "implicit-als": 0.1, "rectools-sasrec": 1.0, "rectools-hstu": 1.2, OURS: 1.5}


def main() -> None:
    options = parse()
    cache = Path(os.environ.get("ELASTICREC_CACHE") or "~/.cache/elasticrec").expanduser()
    work = (options.work or cache / "quality").absolute()
    sets = open_sets(options.sets, (options.stores or work / "stores").absolute(), options.data)
    jobs = [job for dataset in sets for job in jobs_of(dataset, options)]
    if any(job.python == "" for job in jobs):
        python = options.peers_python or peers_python(cache)
        jobs = [replace(job, python=job.python or python) for job in jobs]
    sizes = {dataset.name: float(dataset.store.n_events) for dataset in sets}
    jobs = longest_first(jobs, lambda job: sizes[job.task.dataset] * SLOWNESS[job.task.model])
    done = run(jobs, work / "jobs", options)
    order = {name: place for place, name in enumerate(options.sets)}
    rows, checks = tables(sorted(done, key=lambda job: (order[job.task.dataset], job.task.name)), options.sets)
    os.environ.setdefault("COLUMNS", "220")  # of the table, where the terminal does not say
    publish("quality", rows, checks, options.json)


def run(jobs: list[Job], work: Path, options: argparse.Namespace) -> list[Done]:
    """Every setting with the first seed, then the best of each model with the others."""
    start_s = time.monotonic()
    choices = Counter((job.task.dataset, job.task.model) for job in jobs if job.task.seed == 0)
    waits = [job.task.seed > 0 and choices[job.task.dataset, job.task.model] > 1 for job in jobs]
    now, later = ([job for job, wait in zip(jobs, waits, strict=True) if wait is side] for side in (False, True))
    done = run_all(now, work, parallel=options.parallel, deadline_s=options.deadline)
    groups = by(done, lambda job: (job.task.dataset, job.task.model))
    best = {(group[0].task.dataset, group[0].task.model): best_setting(group) for group in groups}
    later = [job for job in later if job.task.setting == best[job.task.dataset, job.task.model]]
    left_s = options.deadline - (time.monotonic() - start_s)
    return done + run_all(later, work, parallel=options.parallel, deadline_s=left_s)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed, six epochs, small networks, the small sets, one setting a peer")
    add("--json", type=Path)
    add("--sets", nargs="+", default=None, choices=tuple(MAKERS))
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--settings", nargs="+", default=None, help="only these settings of the models")
    add("--seeds", type=int, default=None, help="how many (3)")
    add("--epochs", type=int, default=None, help="budget of every model, else the recipe's for the set")
    add("--ours-override", nargs="+", default=[], metavar="KEY=VALUE", help="network.encoder.width=128 …")
    add("--parallel", type=int, default=None, help="jobs at a time (1; 2 with --quick)")
    add("--threads", type=int, default=None, help="of each job, else the cores over --parallel")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--deadline", type=float, default=NO_LIMIT_S, help="seconds after which to end jobs and report")
    add("--work", type=Path, default=None, help="where finished jobs are kept")
    add("--stores", type=Path, default=None, help="folder of prepared stores by set name")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data")
    add("--peers-python", default=None)
    add("--validation-cases", type=int, default=10_000)
    options = parser.parse_args()
    options.sets = tuple(options.sets or (("ml-100k", "ml-latest-small") if options.quick else MAKERS))
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.epochs = options.epochs or (6 if options.quick else None)
    options.parallel = options.parallel or (2 if options.quick else 1)
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.parallel)
    return options


def jobs_of(dataset: Dataset, options: argparse.Namespace) -> list[Job]:
    """A job for each model, setting and seed; the interpreter of peers is filled in later."""
    changes = (QUICK if options.quick else {}) | overrides(options.ours_override)
    run = overridden(recommended(dataset.store, options.epochs), changes)
    shared = Task(
        dataset=dataset.name,
        fingerprint=dataset.store.fingerprint,
        store=str(dataset.store.path.absolute()),
        more_tests=str(dataset.more_tests) if dataset.more_tests else None,
        remove_seen=dataset.remove_seen,
        max_length=run.network.encoder.max_length,
        epochs=run.epochs,
        every_epochs=run.validation.every_epochs,
        patience=run.validation.patience,
        validation_cases=options.validation_cases,
        model="",
        setting="",
        config={},
        seed=0,
        device=options.device,
        threads=options.threads,
    )
    known = entries(run)
    return [job for name in options.models for job in _jobs(name, known[name], shared, options)]


def _jobs(name: str, entry: Entry, shared: Task, options: argparse.Namespace) -> list[Job]:
    settings = {
        key: config for key, config in entry.settings.items() if options.settings is None or key in options.settings
    }
    if options.quick:
        settings = dict(list(settings.items())[-1:])
    return [
        Job(
            task=replace(shared, model=name, setting=setting, config=config, seed=seed),
            module=entry.module,
            python="" if entry.in_peers_environment else sys.executable,
        )
        for setting, config in settings.items()
        for seed in range(options.seeds if entry.seeds else 1)
    ]


def overrides(words: list[str]) -> dict[str, Any]:
    """["a.b=1"] -> {"a.b": 1}; values are YAML."""
    pairs = (word.partition("=") for word in words)
    return {key: yaml.safe_load(value) for key, _, value in pairs}


if __name__ == "__main__":
    main()
