"""Bodies of recommend requests in, questions of the service out, and its answers as JSON: one user, or thousands."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import orjson
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from elasticrec.serving.api.limits import MAX_OFFSET
from elasticrec.serving.api.problems import OverloadedError, Problem
from elasticrec.serving.api.recommendations import (
    BatchRequest,
    BatchResponse,
    RecommendRequest,
    RecommendResponse,
    Wishes,
)
from elasticrec.serving.caching import large
from elasticrec.serving.cursor import check_cursor, encode_cursor, offset_of
from elasticrec.serving.deadline import require_time
from elasticrec.serving.history import Request
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.service import Ask, Service
from elasticrec.serving.timings import timings

BULK_IN_FLIGHT: Final = 2  # one is in the model, one written; where the stages are apart, each has one
BULK_REQUESTS: Final = 8  # batch requests at a time; they do not wait in the queue of the others, so they have a limit


def add_recommendations(router: APIRouter, service: Service, ask: Ask) -> None:
    """`POST /recommend` and `POST /recommend:batch`."""
    bulk = asyncio.Semaphore(BULK_REQUESTS)

    @router.post(
        "/recommend",
        response_model=RecommendResponse,
        responses={
            409: {"model": Problem, "description": "The cursor is of another question, model version or source"}
        },
        summary="Items that a user may want next",
    )
    async def recommend(body: RecommendRequest) -> Response:
        started_s = time.perf_counter()
        offset = body.offset if body.cursor is None else offset_of(body.cursor)
        asked = to_request(body, body.user_id, tuple(body.history or ()), offset)
        answer = await ask(replace(asked, explain=True) if body.explain else asked)
        version, page_end = answer.version or service.model.version, offset + body.k
        question = _question_of(body, version, answer)
        if body.cursor is not None:
            check_cursor(body.cursor, question)
        more = answer.more and page_end <= MAX_OFFSET
        content = _content(answer) | {
            "model_version": version,
            "degraded": answer.degraded,
            "next_cursor": encode_cursor(page_end, question) if more else None,
            "timings_ms": timings(started_s, answer.timings_ms),
        }
        return Response(orjson.dumps(content), media_type="application/json")

    @router.post("/recommend:batch", response_model=BatchResponse, summary="The same for thousands of users")
    async def recommend_batch(body: BatchRequest, http: HttpRequest) -> Response:
        started_s = time.perf_counter()
        if bulk.locked():
            raise OverloadedError("as many batch requests as may are being answered; come again")
        async with bulk:
            parts = await _in_bulk(service, body)
        tail = {"model_version": service.model.version, "timings_ms": timings(started_s, {})}
        whole = b'{"results":[' + b",".join(parts) + b"]," + orjson.dumps(tail)[1:]
        return await large(http, whole)


def to_request(wishes: Wishes, user_id: str | None, history: tuple[str, ...], offset: int) -> Request:
    """The service's question of a body."""
    return Request(
        k=wishes.k,
        user_id=user_id,
        history=history,
        exclude=tuple(wishes.exclude),
        offset=offset,
        filters=wishes.filters,
        item_boosts=tuple((boost.item_id, boost.factor) for boost in wishes.boosts if boost.item_id is not None),
        category_boosts=tuple((boost.category, boost.factor) for boost in wishes.boosts if boost.category is not None),
        diversity=wishes.diversity,
        remove_seen=wishes.remove_seen,
    )


async def _in_bulk(service: Service, body: BatchRequest) -> list[bytes]:
    """The answers as JSON, some users at a time; single requests get in between them.

    The first error is raised as it is, and ends the rest: it would go on when the caller's turn is over.
    """
    turn, size = asyncio.Semaphore(BULK_IN_FLIGHT), service.bulk_users

    async def some(user_ids: Sequence[str]) -> bytes:
        async with turn:
            require_time()
            answers = await service.recommend([to_request(body, user_id, (), 0) for user_id in user_ids])
        return _rows(user_ids, answers)

    pieces = [body.user_ids[begin : begin + size] for begin in range(0, len(body.user_ids), size)]
    try:
        async with asyncio.TaskGroup() as group:
            answering = [group.create_task(some(piece)) for piece in pieces]
    except ExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__
    return [one.result() for one in answering]


def _rows(user_ids: Sequence[str], answers: Sequence[Recommendation]) -> bytes:
    rows = [{"user_id": user_id} | _content(answer) for user_id, answer in zip(user_ids, answers, strict=True)]
    return orjson.dumps(rows)[1:-1]


def _content(answer: Recommendation) -> dict[str, Any]:
    items: list[dict[str, Any]] = [
        {"item_id": item_id, "title": title, "score": score} for item_id, title, score in answer.items
    ]
    for item, reason in zip(items, answer.reasons, strict=False):
        item["because"] = None if reason is None else {"item_id": reason.item_id, "title": reason.title}
    return {
        "items": items,
        "source": answer.source,
        "history_length": answer.history_length,
    }


def _question_of(body: RecommendRequest, version: str, answer: Recommendation) -> str:
    """All that decides the order of the answers; the size of a page may change between pages."""
    order = f"{version} {answer.source} {answer.degraded} "
    return order + body.model_dump_json(exclude={"k", "offset", "cursor", "explain"})
