"""A text and perhaps a user in, items that match out, those that the user may like first."""

import asyncio
import time
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query
from starlette.responses import Response

from elasticrec.serving.api.limits import MAX_ID_CHARACTERS, MAX_K, MAX_OFFSET, MAX_QUERY_CHARACTERS
from elasticrec.serving.api.problems import UnavailableError
from elasticrec.serving.api.search import SearchResponse
from elasticrec.serving.assortment import View
from elasticrec.serving.filters import MAX_NAMES, Name
from elasticrec.serving.history import Request
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.search import Hit, blend
from elasticrec.serving.service import Ask, Service, Versioned
from elasticrec.serving.timings import timings
from elasticrec.serving.versions import current_of


def add_search(router: APIRouter, service: Service, ask: Ask) -> None:
    """`GET /search`."""

    @router.get("/search", response_model=SearchResponse, summary="Items by their titles and categories")
    async def search(
        q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS, pattern=r"\S", description="typos are forgiven")],
        user_id: Annotated[str | None, Query(min_length=1, max_length=MAX_ID_CHARACTERS)] = None,
        k: Annotated[int, Query(ge=1, le=MAX_K)] = 10,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        category: Annotated[list[Name], Query(max_length=MAX_NAMES, description="one of them")] = [],  # noqa: B006
    ) -> Response:
        started_s = time.perf_counter()
        model, limit = current_of(service.model), max(service.search.pool, offset + k)
        view, hits = await asyncio.to_thread(_hits, model, q, limit, category)
        stages_ms = {"text": 1e3 * (time.perf_counter() - started_s)}
        found = [(hit.item, hit.score / hits[0].score) for hit in hits]
        personal = False
        if user_id is not None and service.search.taste and hits:
            pool = hits[: service.search.pool]
            answer = await ask(_taste(user_id, [view.label(hit.item)[0] for hit in pool]))
            personal = answer.source == "model"
            stages_ms |= answer.timings_ms
            if personal:
                found = _blended(pool, answer, view, service.search.taste) + [
                    (index, (1 - service.search.taste) * score) for index, score in found[len(pool) :]
                ]
        content: dict[str, Any] = {
            "items": [_shown(index, score, view) for index, score in found[offset : offset + k]],
            "personal": personal,
            "model_version": model.version,
            "timings_ms": timings(started_s, stages_ms),
        }
        return Response(orjson.dumps(content), media_type="application/json")


def _hits(model: Versioned, text: str, limit: int, categories: list[str]) -> tuple[View, list[Hit]]:
    view = model.assortment.view()
    if model.index is None:
        raise UnavailableError("this service has no search index")
    hits = model.index.search(text, limit, view, categories)
    return view, [hit for hit in hits if hit.item <= len(view) and hit.item not in view.withdrawn]


def _taste(user_id: str, item_ids: list[str]) -> Request:
    """What the model thinks of all hits; one that the user had may be searched for again."""
    return Request(k=len(item_ids), user_id=user_id, only=tuple(item_ids), remove_seen=False)


def _blended(pool: list[Hit], answer: Recommendation, view: View, weight: float) -> list[tuple[int, float]]:
    """Hits in their new order with scores of 1 to 0. What the model has no score of counts as its least liked one."""
    score_of = {item_id: score for item_id, _, score in answer.items if score is not None}
    least = min(score_of.values(), default=0.0)
    taste = [score_of.get(view.label(hit.item)[0], least) for hit in pool]
    return [(pool[place].item, score) for place, score in blend([hit.score for hit in pool], taste, weight)]


def _shown(index: int, score: float, view: View) -> dict[str, Any]:
    item_id, title = view.label(index)
    return {"item_id": item_id, "title": title, "score": score}
