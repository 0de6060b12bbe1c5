"""Users a second of `jobs.recommend_batch` beside the bare model loop: the same answers without Ray and without files.

A made-up catalogue and histories of ML-100K's size (1,682 items, 20 to 200 events a user), d=64, 2 blocks, L=50, k=10,
on a private cluster that already runs. Both take all cores: the job an actor of one thread for each, the loop a process
of one thread for each, with its share of the users. Of the loop only answering counts, neither the start of processes
nor the opening of the bundle; of the job likewise the time after the first part of each actor. The whole time of the
command stands beside it. In turn, medians.
"""

import functools
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.batch import make
from benchmarks.result import Check, options, publish
from elasticrec.cli.connection import settings
from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.cli.recommend_batch import recommend_batch
from elasticrec.serving.batch import BatchRecommender

K, BATCH_USERS, PART_USERS, TARGET, FLAT_MB = 10, 256, 8_192, 0.9, 20
CORES = os.cpu_count() or 1


def loop(folder: Path, users: range) -> float:
    """Seconds that the answers of these users take in this process."""
    torch.set_num_threads(1)
    recommender = BatchRecommender(str(folder / "bundle"), str(folder / "data"), K)
    for _ in recommender.answers(users[: 4 * BATCH_USERS], BATCH_USERS):
        pass  # warms up
    started_s = time.perf_counter()
    for _ in recommender.answers(users, BATCH_USERS):
        pass
    return time.perf_counter() - started_s


def bare(folder: Path, users: int) -> float:
    """Users a second of all cores."""
    shares = [range(core * users // CORES, (core + 1) * users // CORES) for core in range(CORES)]
    with ProcessPoolExecutor(CORES, mp_context=multiprocessing.get_context("spawn")) as pool:
        return users / max(pool.map(functools.partial(loop, folder), shares))


def job(folder: Path, users: int, out: str) -> tuple[float, float]:
    """Users a second of the command, and of it once each actor has finished a part."""
    started_s = time.perf_counter()
    recommend_batch(str(folder / "bundle"), folder / "data", folder / out, K, BATCH_USERS, PART_USERS)
    took_s = time.perf_counter() - started_s
    done_s = sorted(path.stat().st_mtime for path in (folder / out).glob("part-*"))
    return users / took_s, (users - CORES * PART_USERS) / (done_s[-1] - done_s[CORES - 1])


def watched(run: Callable[[], Any]) -> tuple[Any, list[float]]:
    """What `run` gives, and MB of the largest actor's own memory every second meanwhile."""
    megabytes: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            megabytes.append(max((own_megabytes(pid) for pid in actors()), default=0.0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return run(), megabytes
    finally:
        over.set()
        thread.join()


def actors() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"MapWorker" in (path / "cmdline").read_bytes():
                yield path.name
        except OSError:
            continue


def own_megabytes(pid: str) -> float:
    """Without the pages of the store, which are mapped."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def growth(megabytes: list[float]) -> float:
    """MB between the median of the second quarter and that of the last: actors have started by then."""
    quarter = len(megabytes) // 4
    return statistics.median(megabytes[-quarter:]) - statistics.median(megabytes[quarter : 2 * quarter])


def main() -> None:
    chosen = options(__doc__ or "")
    users, rounds = (60_000, 1) if chosen.quick else (300_000, 3)
    speeds: dict[str, list[float]] = {"bare loop": [], "job": [], "job and its start": []}
    memory: list[float] = []
    config = LocalClusterConfig(num_cpus=CORES, train_slots=0, auth="token")
    with tempfile.TemporaryDirectory() as scratch, local_cluster(config) as cluster, settings(cluster.env):
        make(Path(scratch), users)
        for number in range(rounds):
            speeds["bare loop"].append(bare(Path(scratch), users))
            told, memory = watched(functools.partial(job, Path(scratch), users, f"top-{number}"))
            for way, speed in zip(("job and its start", "job"), told, strict=True):
                speeds[way].append(speed)
    rows = [
        {"way": way, "users": users, "users_per_s": statistics.median(found), "least": min(found)}
        for way, found in speeds.items()
    ]
    publish("batch_job", rows, list(checks(speeds, None if chosen.quick else growth(memory))), chosen.json)


def checks(speeds: dict[str, list[float]], grown: float | None) -> Iterator[Check]:
    """The targets of the issue."""
    ratio = statistics.median(ours / bare for ours, bare in zip(speeds["job"], speeds["bare loop"], strict=True))
    name = "throughput of the bare model loop"
    yield Check(name=name, value=ratio, target=TARGET, unit="times", holds=ratio >= TARGET)
    if grown is not None:
        name = "an actor's memory is flat: growth from the second quarter of the run to the last"
        yield Check(name=name, value=grown, target=FLAT_MB, unit="MB", holds=grown <= FLAT_MB)


if __name__ == "__main__":
    main()
