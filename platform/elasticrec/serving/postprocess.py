"""A prepared batch and its candidates in, each request's answer out: k items, never a seen or an excluded one.

# K candidates
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elasticrec.data.sequences import Float32, Int32
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.history import Background, Prepared
from elasticrec.serving.scorer import Candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """One item of an answer; no score where popularity chose it."""

    item_id: str
    title: str | None
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """The answer to one request. Times of encode and retrieve are those of the batch it was part of."""

    items: tuple[Chosen, ...]
    source: Literal["model", "popularity"]
    history_length: int
    timings_ms: dict[str, float]
    version: str = ""  # of the model that answered, where there are several
    degraded: bool = False  # popularity answered in place of a model that is down or late


def finish(prepared: Prepared, candidates: Candidates | None, catalogue: Catalogue) -> list[Recommendation]:
    """Answers in the order of the requests; `candidates` is none exactly when the batch has no question."""
    timings_ms = {"history": prepared.history_ms}
    rows: Iterator[tuple[Int32, Float32]] = iter(())
    if candidates is not None:
        timings_ms |= {"encode": candidates.encode_ms, "retrieve": candidates.retrieve_ms}
        rows = zip(candidates.item_BK, candidates.score_BK, strict=True)
    recommendations = []
    for background in prepared.backgrounds:
        started_s = time.perf_counter()
        known = len(background.items) > 0
        items = _best(background, *next(rows), catalogue) if known else _popular(background, catalogue)
        recommendations.append(
            Recommendation(
                items=items,
                source="model" if known else "popularity",
                history_length=len(background.items),
                timings_ms=timings_ms | {"postprocess": 1e3 * (time.perf_counter() - started_s)},
            )
        )
    return recommendations


def popular(prepared: Prepared, catalogue: Catalogue) -> list[Recommendation]:
    """Answers without the network: what is popular and not blocked, whatever is known of the user."""
    return [
        Recommendation(
            items=_popular(background, catalogue),
            source="popularity",
            history_length=len(background.items),
            timings_ms={"history": prepared.history_ms},
        )
        for background in prepared.backgrounds
    ]


def _best(background: Background, item_K: Int32, score_K: Float32, catalogue: Catalogue) -> tuple[Chosen, ...]:
    # Candidates were chosen for the largest k of the batch; -inf ends the items that may be returned.
    count = min(background.request.k, int(np.isfinite(score_K).sum()))
    pairs = zip(item_K[:count].tolist(), score_K[:count].tolist(), strict=True)
    return tuple(_chosen(catalogue, index, score) for index, score in pairs)


def _popular(background: Background, catalogue: Catalogue) -> tuple[Chosen, ...]:
    indices = catalogue.popular(background.request.k, background.blocked)
    return tuple(_chosen(catalogue, index, None) for index in indices.tolist())


def _chosen(catalogue: Catalogue, index: int, score: float | None) -> Chosen:
    item_id, title = catalogue.label(index)
    return Chosen(item_id=item_id, title=title, score=score)
