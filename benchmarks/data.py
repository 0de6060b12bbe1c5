"""A made-up log of up to 1M users, 1M items and 100M interactions: made, ingested, opened, and read step by step.

Every measurement has a process of its own, whose peak of resident memory is its own. "A core" is a second of processor
time, of user and system, over all threads.
"""

import concurrent.futures
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from benchmarks.result import Check, options, publish
from elasticrec.columns import COUNT, EVENT, ITEM, TIME, USER
from elasticrec.data.plan import Plan, PlanConfig
from elasticrec.data.prepare import PrepareConfig, prepare
from elasticrec.data.sequences import Store, open_store
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.data.synthetic import INTERACTIONS, SyntheticConfig, sized, write_log

SMALL = (20_000, 20_000, 2_000_000)  # users, items, interactions
LARGE = (1_000_000, 1_000_000, 100_000_000)
STEPS, WINDOW = 200, 50
Measured = dict[str, float]


def apart(work: Callable[..., Measured], *arguments: Any) -> Measured:
    """Runs `work` in a new process; adds the seconds, processor seconds and the peak of resident memory in MB."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., Measured], *arguments: Any) -> Measured:
    start_s, busy_s = time.perf_counter(), time.process_time()
    found = work(*arguments)
    seconds = {"seconds": time.perf_counter() - start_s, "core_seconds": time.process_time() - busy_s}
    return seconds | {"peak_mb": memory_mb()["VmHWM"]} | found


def memory_mb() -> dict[str, float]:
    """Resident memory of this process: RssAnon is its own, RssFile are mapped files, VmHWM is the peak of all."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) / 1e3 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}


def generated(size: tuple[int, int, int], out: Path) -> Measured:
    write_log(sized(*size, seed=0), out)
    return {}


def ingested(source: Path, out: Path) -> Measured:
    config = PrepareConfig(interactions=(str(source),), out=out, time=TIME, event=EVENT, engine="local")
    prepare(config, say=len, command="benchmark")
    return {}


def with_pandas(source: Path) -> Measured:
    """The plain way to the same arrays, all in memory."""
    frame = pd.read_parquet(source)
    user_E, item_E = pd.factorize(frame[USER])[0], pd.factorize(frame[ITEM])[0]
    order_E = np.lexsort((frame[TIME].to_numpy(), user_E))
    return {"sum": float(item_E[order_E][:10].sum())}


def started(store: Path) -> Measured:
    """From nothing to the first windows, then `STEPS` steps, then five times as many."""
    begin_s = time.perf_counter()
    opened = open_store(store)
    plan = Plan(PlanConfig(), opened.sequences, split(LeaveOneOut(), opened.sequences), WINDOW)
    plan.windows(0, plan.users(0))
    first_s, before = time.perf_counter() - begin_s, memory_mb()
    taken = []
    for step in range(1, 6 * STEPS):
        plan.windows(step, plan.users(step))
        if step in (STEPS, 6 * STEPS - 1):
            taken.append(memory_mb())
    after, long_after = taken
    return {
        "first_s": first_s,
        "own_growth_mb": after["RssAnon"] - before["RssAnon"],
        "mapped_mb": after["RssFile"] - before["RssFile"],
        "late_growth_mb": long_after["VmRSS"] - after["VmRSS"],
        "arrays_mb": sum(file.stat().st_size for file in store.glob("*.arrow")) / 1e6,
    }


def rewritten(log: Path, kind: str, out: Path) -> Path:
    """The same log with other ids or as csv."""
    table = pq.read_table(log)
    out.mkdir()
    if kind == "csv":
        pacsv.write_csv(table, out / "log.csv")
        return out
    for place, (name, prefix) in enumerate(((USER, "u"), (ITEM, "i"))):
        number = table[name]
        if kind == "scattered text ids":
            number = pc.multiply(pc.add(number, 1), pa.scalar(2_654_435_761, pa.int64()))
            number = pc.binary_join_element_wise(pc.utf8_reverse(pc.cast(number, pa.string())), "x", "")
        text = pc.binary_join_element_wise(pa.scalar(prefix), pc.cast(number, pa.string()), "")
        table = table.set_column(place, name, text)
    pq.write_table(table, out / "log.parquet")
    return out


def structure(store: Store, config: SyntheticConfig) -> dict[str, float]:
    """What a log holds that can be learned."""
    item_E, offset_U1 = store.sequences.item_E, store.sequences.offset_U1
    items = store.items()
    raw_I1 = np.concatenate([[0], pc.cast(items[ITEM], pa.int64()).to_numpy()])
    user_E = np.repeat(np.arange(store.n_users), np.diff(offset_U1))
    inside_E = user_E[1:] == user_E[:-1]
    assert store.sequences.time_E is not None
    gap_s = np.diff(store.sequences.time_E)[inside_E]
    interest_E = raw_I1[item_E] % config.interests
    popular, sequence = hit_rates(store)
    return {
        "Zipf exponent, ranks 10 to a tenth of the items": zipf_exponent(items[COUNT].to_numpy()),
        "share of events with an item the user had before": 1
        - len(np.unique(user_E * len(raw_I1) + item_E)) / len(item_E),
        "share of successive events of one interest": float((interest_E[1:] == interest_E[:-1])[inside_E].mean()),
        "the same for events drawn anywhere": float(
            (np.bincount(interest_E) / len(item_E)) @ (np.bincount(interest_E) / len(item_E))
        ),
        "median gap, s": float(np.median(gap_s)),
        "90 % of gaps below, s": float(np.quantile(gap_s, 0.9)),
        "99 % of gaps below, s": float(np.quantile(gap_s, 0.99)),
        "HR@10 of the last event by popularity": popular,
        "HR@10 of the last event by what followed the item before": sequence,
    }


def zipf_exponent(count_I: np.ndarray[Any, Any]) -> float:
    """Slope of log count over log rank; the counts come most frequent first."""
    rank = np.unique(np.geomspace(10, len(count_I) // 10, 50).astype(np.int64))
    return float(-np.polyfit(np.log(rank), np.log(count_I[rank - 1]), 1)[0])


def hit_rates(store: Store) -> tuple[float, float]:
    """The last event of each user asked of the ten most popular items and of the ten most frequent successors."""
    item_E, end_U = store.sequences.item_E.astype(np.int64), store.sequences.offset_U1[1:]
    train_E = np.ones(len(item_E), dtype=bool)
    train_E[end_U - 1] = False
    train_E[store.sequences.offset_U1[:-1]] = False  # what a user begins with follows nothing
    width = store.n_items + 1
    pair_N, count_N = np.unique(item_E[:-1][train_E[1:]] * width + item_E[1:][train_E[1:]], return_counts=True)
    pair_N = pair_N[np.lexsort((-count_N, pair_N // width))]
    before_N = pair_N // width
    place_N = np.arange(len(pair_N)) - np.searchsorted(before_N, before_N)
    best_IK = np.zeros((width, 10), dtype=np.int64)
    best_IK[before_N[place_N < 10], place_N[place_N < 10]] = pair_N[place_N < 10] % width
    target_U, last_U = item_E[end_U - 1], item_E[end_U - 2]
    return float((target_U <= 10).mean()), float((best_IK[last_U] == target_U[:, None]).any(axis=1).mean())


def measure(folder: Path, size: tuple[int, int, int], shown: str) -> tuple[list[dict[str, Any]], Measured, Measured]:
    """Makes, ingests and opens a log; it stays in the folder `shown`, its store in `shown`-store."""
    log, store, events = folder / shown, folder / f"{shown}-store", size[2]
    made = apart(generated, size, log)
    read = apart(ingested, log / INTERACTIONS, store)
    opened = apart(started, store)
    rows = [
        row(f"{shown}: generator", events / made["seconds"] / 1e6, "M events/s", made["peak_mb"]),
        ingest_row(f"{shown}: ingest, parquet, whole-number ids", events, read),
        row(f"{shown}: ingest, both cores", events / read["seconds"] / 1e6, "M events/s", read["peak_mb"]),
        row(f"{shown}: open, split, plan, first windows", opened["first_s"], "s", opened["peak_mb"]),
        row(f"{shown}: own memory, growth over {STEPS} steps", opened["own_growth_mb"], "MB", opened["peak_mb"]),
        row(f"{shown}: pages of mapped arrays, then", opened["mapped_mb"], "MB", opened["peak_mb"]),
        row(
            f"{shown}: all memory, growth in {5 * STEPS} further steps",
            opened["late_growth_mb"],
            "MB",
            opened["peak_mb"],
        ),
    ]
    return rows, read, opened


def ingest_row(name: str, events: int, read: Measured) -> dict[str, Any]:
    return row(name, events / read["core_seconds"] / 1e6, "M events/s/core", read["peak_mb"])


def row(name: str, value: float, unit: str, peak_mb: float | None = None) -> dict[str, Any]:
    return {"measured": name, "value": value, "unit": unit, "peak RSS MB": "" if peak_mb is None else round(peak_mb)}


def variants(folder: Path, log: Path) -> list[dict[str, Any]]:
    """Ingest of the small log in other forms, and the plain way of pandas."""
    rows = []
    for kind in ("csv", "text ids", "scattered text ids"):
        source = rewritten(log / INTERACTIONS, kind, folder / kind.replace(" ", "-"))
        read = apart(ingested, source, folder / "variant-store")
        rows.append(ingest_row(f"2M: ingest, {kind}", SMALL[2], read))
    rows.append(
        ingest_row(
            "2M: pandas factorize and numpy lexsort, unchecked, nothing written",
            SMALL[2],
            apart(with_pandas, log / INTERACTIONS),
        )
    )
    return rows


def checks(shown: str, events: int, read: Measured, opened: Measured, hits: tuple[float, float]) -> list[Check]:
    rate, first_s, own_mb = events / read["core_seconds"] / 1e6, opened["first_s"], opened["own_growth_mb"]
    mapped_mb, arrays_mb = opened["mapped_mb"] + opened["late_growth_mb"], opened["arrays_mb"]
    better = hits[1] / hits[0]
    flat = f"resident memory stays flat over {STEPS} steps: its own"
    return [
        Check(
            name=f"ingest of {shown} interactions, parquet, whole-number ids",
            value=rate,
            target=2,
            unit="M events/s/core",
            holds=rate >= 2,
        ),
        Check(name=f"training starts on {shown}", value=first_s, target=3, unit="s", holds=first_s < 3),
        Check(name=flat, value=own_mb, target=1, unit="MB", holds=own_mb <= 1),
        Check(
            name="resident memory stays flat: mapped pages, below the arrays",
            value=mapped_mb,
            target=arrays_mb,
            unit="MB",
            holds=mapped_mb <= arrays_mb,
        ),
        Check(name="successors beat popularity on HR@10", value=better, target=1, unit="times", holds=better > 1),
    ]


def main() -> None:
    chosen = options(__doc__ or "")
    folder = Path(tempfile.mkdtemp(prefix="elasticrec-data-"))
    try:
        rows, read, opened = measure(folder, SMALL, "2M")
        rows += variants(folder, folder / "2M")
        found = structure(open_store(folder / "2M-store"), sized(*SMALL, seed=0))
        rows += [row(f"2M: {name}", value, "") for name, value in found.items()]
        hits = (
            found["HR@10 of the last event by popularity"],
            found["HR@10 of the last event by what followed the item before"],
        )
        shown, events = "2M", SMALL[2]
        if not chosen.quick:
            large, read, opened = measure(folder, LARGE, "100M")
            count_I = open_store(folder / "100M-store").items()[COUNT].to_numpy()
            rows += [*large, row("100M: Zipf exponent, ranks 10 to a tenth of the items", zipf_exponent(count_I), "")]
            shown, events = "100M", LARGE[2]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    publish("data", rows, checks(shown, events, read, opened, hits), chosen.json)


if __name__ == "__main__":
    main()
