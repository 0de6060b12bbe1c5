"""A prepared batch and its candidates in, each request's answer out: k items, never a seen or an excluded one.

# B rows, K candidates, A added items, F of them that may be returned, D width
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from elasticrec.data.sequences import Float32, Int32, Int64
from elasticrec.serving.assortment import View
from elasticrec.serving.diversity import POOL, diversify
from elasticrec.serving.history import Background, Prepared
from elasticrec.serving.question import Candidates
from elasticrec.serving.setup import GatewaySetup


class Chosen(NamedTuple):
    """One item of an answer; no score where popularity chose it."""

    item_id: str
    title: str | None
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """The answer to one request. Times of encode, retrieve and rank are those of the batch it was part of."""

    items: tuple[Chosen, ...]
    source: Literal["model", "popularity"]
    history_length: int
    timings_ms: dict[str, float]
    more: bool = False  # whether the next page has items
    version: str = ""  # of the model that answered, where there are several
    degraded: bool = False  # popularity answered in place of a model that is down or late
    blocked: int = 0  # items that the user had, or that the request excludes
    filtered: int = 0  # items that its filters do not allow
    reasons: tuple[Chosen | None, ...] = ()  # of each item, where the request wanted them


class _Row(NamedTuple):
    """Candidates of one request, best first; NaN scores of those that popularity chose."""

    item_K: Int64
    score_K: Float32
    direction_KD: Float32 | None
    reason_K: Int32 | None = None  # of the candidates in their first order


class Postprocess:
    """The last stage: puts items added at run time among the candidates, spreads them out, and cuts the page."""

    def __init__(self, setup: GatewaySetup) -> None:
        self._cosine = setup.cosine
        self._prior = setup.prior

    def finish(
        self, prepared: Prepared, candidates: Candidates | None, likes: Candidates | None
    ) -> list[Recommendation]:
        """Answers in the order of the requests; candidates are none exactly where the batch has no such question."""
        timings_ms = {"history": prepared.history_ms} | _times(candidates, likes)
        answered, alike = _rows(candidates), _rows(likes)
        recommendations = []
        for background in prepared.backgrounds:
            started_s = time.perf_counter()
            like = background.request.like is not None
            by_model = like or len(background.items) > 0
            row = next(alike if like else answered) if by_model else None
            items, more = self._page(background, row, prepared.view)
            reasons = _reasons(items, row, prepared.view) if background.request.explain else ()
            recommendations.append(
                Recommendation(
                    items=items,
                    reasons=reasons,
                    source="model" if by_model else "popularity",
                    history_length=len(background.items),
                    timings_ms=timings_ms | {"postprocess": 1e3 * (time.perf_counter() - started_s)},
                    more=more,
                    blocked=len(background.blocked),
                    filtered=_filtered(background),
                )
            )
        return recommendations

    def popular(self, prepared: Prepared) -> list[Recommendation]:
        """Answers without the network: what is popular and allowed, whatever is known of the user."""
        recommendations = []
        for background in prepared.backgrounds:
            items, more = self._page(background, None, prepared.view)
            recommendations.append(
                Recommendation(
                    items=items,
                    source="popularity",
                    history_length=len(background.items),
                    timings_ms={"history": prepared.history_ms},
                    more=more,
                )
            )
        return recommendations

    def _page(
        self, background: Background, answer: "tuple[_Row, Float32] | None", view: View
    ) -> tuple[tuple[Chosen, ...], bool]:
        request = background.request
        if answer is None:
            row = _popular(background, view)
        else:
            row = answer[0]
            if view.added:
                row = self._with_added(background, row, answer[1], view)
        item_K, score_K = row.item_K, row.score_K
        if request.diversity:
            order = _spread(row, request.diversity, request.wanted, view)
            item_K, score_K = item_K[order], score_K[order]
        page = slice(request.offset, request.offset + request.k)
        label = view.label
        chosen = tuple(
            Chosen(*label(index), score if score == score else None)  # noqa: PLR0124 - NaN: by popularity
            for index, score in zip(item_K[page].tolist(), score_K[page].tolist(), strict=True)
        )
        return chosen, len(item_K) > page.stop

    def _with_added(self, background: Background, row: _Row, query_D: Float32, view: View) -> _Row:
        """Added items by the content tower's vectors; those without one come last, the most popular first."""
        blocked = set(background.blocked.tolist())
        free = [index for index in view.added_now() if index not in blocked]
        if background.mask_I is not None:
            free = [index for index in free if background.mask_I[index]]
        if not free:
            return row
        item_F = np.array(free)
        vector_FD = view.rows(item_F)
        if vector_FD is None:
            return _with_unscored(row, item_F, view)
        scored_F = ~np.isnan(vector_FD[:, 0])
        if scored_F.any():
            row = self._with_scored(background, row, query_D, view, item_F[scored_F], vector_FD[scored_F])
        return row if scored_F.all() else _with_unscored(row, item_F[~scored_F], view)

    def _with_scored(
        self, background: Background, row: _Row, query_D: Float32, view: View, item_F: Int64, vector_FD: Float32
    ) -> _Row:
        direction_FD = vector_FD / np.maximum(np.linalg.norm(vector_FD, axis=1, keepdims=True), 1e-12)
        like = background.request.like is not None
        score_F = (direction_FD if self._cosine or like else vector_FD) @ query_D
        score_F = score_F + np.array(
            [self._extra(index, background, view) for index in item_F.tolist()], dtype=np.float32
        )
        merged = _joined(row, item_F, score_F, direction_FD if row.direction_KD is not None else None)
        order = np.argsort(-merged.score_K, kind="stable")
        directions = None if merged.direction_KD is None else merged.direction_KD[order]
        return _Row(merged.item_K[order], merged.score_K[order], directions)

    def _extra(self, index: int, background: Background, view: View) -> float:
        """Prior and bonus of one added item."""
        if background.request.like is not None:
            return 0.0
        bonus = float(background.bonus_M[background.bonus_item_M == index].sum())
        if self._prior is None:
            return bonus
        item = view.item(index)
        return bonus + self._prior.of(item.count, item.published_s)


def _reasons(items: tuple[Chosen, ...], answer: "tuple[_Row, Float32] | None", view: View) -> tuple[Chosen | None, ...]:
    """The item of the history that is most like each; none of items that the network has no vector of."""
    if answer is None or answer[0].reason_K is None:
        return (None,) * len(items)
    reason_of = dict(zip(answer[0].item_K.tolist(), answer[0].reason_K.tolist(), strict=True))
    found = [reason_of.get(view.index(item.item_id) or 0, 0) for item in items]
    return tuple(Chosen(*view.label(index), None) if index else None for index in found)


def _filtered(background: Background) -> int:
    mask_I = background.mask_I
    return 0 if mask_I is None else len(mask_I) - 1 - int(np.count_nonzero(mask_I[1:]))


def _rows(candidates: Candidates | None) -> "Iterator[tuple[_Row, Float32]]":
    """Row by row the items that may be returned, which -inf says no wherever a ranker puts it; and the query."""
    if candidates is None:
        return
    direction_BKD, reason_BK = candidates.direction_BKD, candidates.reason_BK
    for number, free_K in enumerate(np.isfinite(candidates.score_BK)):
        row = _Row(
            candidates.item_BK[number][free_K].astype(np.int64),
            candidates.score_BK[number][free_K],
            None if direction_BKD is None else direction_BKD[number][free_K],
            None if reason_BK is None else reason_BK[number][free_K],
        )
        yield row, candidates.query_BD[number]


def _times(candidates: Candidates | None, likes: Candidates | None) -> dict[str, float]:
    found = [one for one in (candidates, likes) if one is not None]
    if not found:
        return {}
    return {
        "encode": sum(one.encode_ms for one in found),
        "retrieve": sum(one.retrieve_ms for one in found),
        "rank": sum(one.rank_ms for one in found),
    }


def _popular(background: Background, view: View) -> _Row:
    """What most people had; boosts count as factors of how many they are."""
    request, bonus_M = background.request, background.bonus_M
    if request.only is None and not len(bonus_M):
        filters = None if background.mask_I is None else request.filters
        item_K: Int32 | Int64 = view.popular(request.wanted, background.blocked, filters)
    else:
        mask_I = np.ones(len(view) + 1, dtype=np.bool_) if background.mask_I is None else background.mask_I.copy()
        mask_I[[0, *view.withdrawn]] = False
        mask_I[background.blocked] = False
        odds_I = np.log1p(view.counts())
        odds_I[background.bonus_item_M] += bonus_M
        free_F = np.flatnonzero(mask_I)
        item_K = free_F[np.argsort(-odds_I[free_F], kind="stable")][: request.wanted]
    return _Row(item_K.astype(np.int64), np.full(len(item_K), np.nan, dtype=np.float32), None)


def _with_unscored(row: _Row, item_F: Int64, view: View) -> _Row:
    item_F = np.array(sorted(item_F.tolist(), key=lambda index: (-view.count(index), index)))
    zero_FD = None
    if row.direction_KD is not None:
        zero_FD = np.zeros((len(item_F), row.direction_KD.shape[1]), dtype=np.float32)
    return _joined(row, item_F, np.full(len(item_F), np.nan, dtype=np.float32), zero_FD)


def _joined(row: _Row, item_F: Int64, score_F: Float32, direction_FD: Float32 | None) -> _Row:
    directions = None
    if row.direction_KD is not None and direction_FD is not None:
        directions = np.concatenate([row.direction_KD, direction_FD])
    return _Row(np.concatenate([row.item_K, item_F]), np.concatenate([row.score_K, score_F]), directions)


def _spread(row: _Row, diversity: float, wanted: int, view: View) -> Int64:
    """An order of all candidates: the pool by MMR, what lies behind it as it was."""
    pool = min(POOL, len(row.item_K))
    relevance_K = row.score_K[:pool]
    if not np.isfinite(relevance_K).all():  # by popularity: the place stands for the score
        relevance_K = np.arange(pool, 0, -1, dtype=np.float32)
    direction_KD = _by_categories(row.item_K[:pool], view) if row.direction_KD is None else row.direction_KD[:pool]
    order = diversify(relevance_K, direction_KD, diversity, min(pool, wanted))
    left = np.setdiff1d(np.arange(len(row.item_K)), order)
    return np.concatenate([order, left])


def _by_categories(item_K: Int64, view: View) -> Float32:
    """One direction an item: its categories, all of the same weight."""
    categories = [view.item(index).categories for index in item_K.tolist()]
    place_of = {name: place for place, name in enumerate(sorted({name for names in categories for name in names}))}
    direction_KC = np.zeros((len(item_K), max(1, len(place_of))), dtype=np.float32)
    for row_C, names in zip(direction_KC, categories, strict=True):
        if names:
            row_C[[place_of[name] for name in names]] = len(names) ** -0.5
    return direction_KC
