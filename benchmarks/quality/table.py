"""Finished jobs in, the rows and checks of the result out. Pure.

# S seeds, C cases
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from benchmarks.quality.jobs import Done
from benchmarks.quality.models import OURS
from benchmarks.quality.statistics import Float64, paired_interval, seed_error, user_error
from benchmarks.quality.task import K
from benchmarks.result import Check
from elasticrec.evaluation.metrics import hit_rate, ndcg

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A model on one test, with the setting that validated best."""

    dataset: str
    model: str
    setting: str
    hit_SC: Float64
    ndcg_SC: Float64
    validation: float
    best_epoch: float
    train_s: float

    @property
    def ndcg(self) -> float:
        return float(self.ndcg_SC.mean())


def tables(done: Sequence[Done], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[Check]]:
    """One row for each test and model, and the targets.

    Args:
        names: the tests that the targets speak of.
    """
    measured = [entry for group in by(done, lambda job: (job.task.dataset, job.task.model)) for entry in chosen(group)]
    rows = [row for group in by(measured, lambda entry: entry.dataset) for row in _rows(group)]
    return rows + failures(done), checks(measured, names)


def chosen(group: Sequence[Done]) -> list[Measured]:
    """One model with its best setting, on every test of the set."""
    setting = best_setting(group)
    jobs = [job for job in group if not job.failure and job.task.setting == setting]
    return [_measured(jobs, test) for test in jobs[0].ranks] if jobs else []


def best_setting(group: Sequence[Done]) -> str | None:
    """The setting of one model that validates best with its first seed; none when all failed."""
    first = [job for job in group if not job.failure and job.task.seed == 0]
    return max(first, key=lambda job: float(job.outcome["validation"])).task.setting if first else None


def _measured(jobs: Sequence[Done], test: str) -> Measured:
    rank_SC = np.stack([job.ranks[test].astype(np.int64) for job in sorted(jobs, key=lambda job: job.task.seed)])
    return Measured(
        dataset=test,
        model=jobs[0].task.model,
        setting=jobs[0].task.setting,
        hit_SC=hit_rate(rank_SC, K),
        ndcg_SC=ndcg(rank_SC, K),
        validation=float(np.mean([job.outcome["validation"] for job in jobs])),
        best_epoch=float(np.mean([job.outcome["best_epoch"] for job in jobs])),
        train_s=float(np.mean([job.outcome.get("train_s", 0.0) for job in jobs])),
    )


def _rows(group: Sequence[Measured]) -> list[dict[str, Any]]:
    ours = next((entry for entry in group if entry.model == OURS), None)
    return [_row(entry, ours) for entry in sorted(group, key=lambda entry: entry.ndcg)]


def _row(entry: Measured, ours: Measured | None) -> dict[str, Any]:
    row = {
        "test": entry.dataset,
        "model": entry.model,
        "setting": entry.setting,
        "seeds": len(entry.ndcg_SC),
        "users": entry.ndcg_SC.shape[1],
        "epoch": round(entry.best_epoch, 1),
        f"val NDCG@{K}": round(entry.validation, 5),
        f"HR@{K}": round(float(entry.hit_SC.mean()), 5),
        "± seeds": round(seed_error(entry.hit_SC), 5),
        f"NDCG@{K}": round(entry.ndcg, 5),
        "± seeds ": round(seed_error(entry.ndcg_SC), 5),
        "± users": round(user_error(entry.ndcg_SC), 5),
        "ours ahead": "",
        "95 %": "",
        "ours ahead, %": "",
        "note": "",
    }
    if ours is not None and entry is not ours:
        low, high = paired_interval(*_paired(ours, entry))
        row |= {
            "ours ahead": round(ours.ndcg - entry.ndcg, 5),
            "95 %": f"{low:.4f} … {high:.4f}",
            "ours ahead, %": round(100 * gain(ours, entry), 1),
        }
    return row


def _paired(one: Measured, other: Measured) -> tuple[Float64, Float64]:
    """Both with the same seeds; a model without chance in it has one result for all."""
    if 1 in (len(one.ndcg_SC), len(other.ndcg_SC)):
        return one.ndcg_SC, other.ndcg_SC
    seeds = min(len(one.ndcg_SC), len(other.ndcg_SC))
    return one.ndcg_SC[:seeds], other.ndcg_SC[:seeds]


def gain(one: Measured, other: Measured) -> float:
    """Relative gain in mean NDCG."""
    return one.ndcg / other.ndcg - 1 if other.ndcg else float("inf")


def checks(measured: Sequence[Measured], names: Sequence[str]) -> list[Check]:
    """Ahead of the best peer on every set, and by 8 % on average; nothing is said of a set without both."""
    gains = {}
    for name in names:
        peers = [entry for entry in measured if entry.dataset == name and entry.model != OURS]
        ours = [entry for entry in measured if entry.dataset == name and entry.model == OURS]
        if peers and ours:
            gains[name] = gain(ours[0], max(peers, key=lambda entry: entry.ndcg))
    if not gains:
        return []
    least, mean = min(gains.values()), float(np.mean(list(gains.values())))
    compared = ", ".join(gains)
    return [
        Check(
            name=f"ahead of the best peer on NDCG@{K} on every set ({compared}): the least gain",
            value=100 * least,
            target=0.0,
            unit="%",
            holds=least > 0 and len(gains) == len(names),
        ),
        Check(
            name="ahead of the best peer on average",
            value=100 * mean,
            target=8.0,
            unit="%",
            holds=mean >= 0.08 and len(gains) == len(names),
        ),
    ]


def failures(done: Sequence[Done]) -> list[dict[str, Any]]:
    """A row for each job without a result, with the columns of the others."""
    keys = list(_row(_EMPTY, None))
    return [
        dict.fromkeys(keys, "")
        | {
            "test": job.task.dataset,
            "model": job.task.model,
            "setting": job.task.setting,
            "seeds": f"seed {job.task.seed}",
            "note": f"failed: {job.failure[-80:]}",  # the whole reason is in the job's log.txt
        }
        for job in done
        if job.failure
    ]


_EMPTY = Measured(
    dataset="",
    model="",
    setting="",
    hit_SC=np.zeros((1, 1)),
    ndcg_SC=np.zeros((1, 1)),
    validation=0.0,
    best_epoch=0.0,
    train_s=0.0,
)


def by(entries: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Entries with the same key together, in the order that keys first come."""
    groups: dict[object, list[T]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return list(groups.values())
