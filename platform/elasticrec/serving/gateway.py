"""A recommender and an event store in, the HTTP API (ASGI) out.

Knows nothing of Ray: `http_replica` runs it in Serve replicas, tests and benchmarks run it on a bare uvicorn.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from elasticrec import __version__
from elasticrec.monitoring.series import WAITING
from elasticrec.serving.admin import admin
from elasticrec.serving.answers import Answers, fair_s
from elasticrec.serving.api.events import EventsRequest, EventsResponse
from elasticrec.serving.api.health import HealthResponse
from elasticrec.serving.api.problems import (
    ApiError,
    DeadlineError,
    MissingQueryError,
    Problem,
    UnavailableError,
    problem,
)
from elasticrec.serving.auth import KeyRing
from elasticrec.serving.batcher import Batcher
from elasticrec.serving.console import console
from elasticrec.serving.document import documented
from elasticrec.serving.door import Door
from elasticrec.serving.events import EventStoreError, StoredEvent
from elasticrec.serving.guard import Guard, ProblemResponse, Protection, respond
from elasticrec.serving.history import Request
from elasticrec.serving.item_routes import add_items
from elasticrec.serving.items import ItemStoreError
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.readiness import Readiness
from elasticrec.serving.recommend_routes import add_recommendations
from elasticrec.serving.search_routes import add_search
from elasticrec.serving.service import Service
from elasticrec.serving.timings import timings
from elasticrec.serving.users import users

__all__ = ["Service", "create_app", "in_thread"]

MAX_EVENT_BATCH = 256  # requests whose events share one commit
READY_TIMEOUT_S = 5.0
_NO_TEXT = ("missing", "string_pattern_mismatch")
_MAX_SHOWN_ERRORS = 10
_MAX_SHOWN_CHARACTERS = 200
_LOGGER = logging.getLogger(__name__)

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "The body is no JSON, or a search has no text",
        401: "No key, or an unknown one",
        403: "The key has not the scope",
        413: "The body is too large",
        422: "A field does not fit; `errors` names each",
        429: "Too many requests; come again after `Retry-After`",
        504: "The time that the request allowed is over",
        503: "The model or the event store does not answer; try again",
    }.items()
}


def in_thread(
    recommend: Callable[[Sequence[Request]], list[Recommendation]], executor: Executor
) -> Callable[[Sequence[Request]], Awaitable[list[Recommendation]]]:
    """A plain recommender as one that leaves the event loop free."""

    async def run(requests: Sequence[Request]) -> list[Recommendation]:
        return await asyncio.get_running_loop().run_in_executor(executor, recommend, requests)

    return run


def create_app(
    service: Service, keys: KeyRing | None, protection: Protection | None = None, door: Door | None = None
) -> FastAPI:
    """The API. Without keys every caller may do everything: the address must then be a loopback one.

    `door`: kept by this app's guard from the first request on.
    """
    app = FastAPI(
        title="elasticrec",
        version=__version__,
        summary="Recommendations from live histories",
        responses=_PROBLEMS,
        redoc_url=None,
    )
    app.include_router(_product(service, fair_s((protection or Protection()).timeout_ms)))
    app.include_router(_events(service))
    app.include_router(users(lambda: service.model.catalogue, service.events, service.event_thread))
    app.include_router(admin(service))
    app.include_router(console())
    app.include_router(_health(service))
    _add_problems(app)
    app.openapi = documented(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, keys=keys, protection=protection, watch=service.watch, meter=service.meter, door=door)
    return app


def _product(service: Service, fair_s: float) -> APIRouter:
    router = APIRouter(prefix="/v1")
    questions = Batcher(
        service.recommend,
        max_batch=service.max_batch,
        in_flight=service.batches_in_flight,
        max_waiting=service.max_waiting,
        alone=True,
        group=service.group,
    )
    answers = Answers(questions.submit, service.model.popular, service.circuit, service.meter, fair_s, service.watch)
    service.meter.waiting = lambda: questions.waiting
    service.watch.ledger.level(WAITING, lambda: questions.waiting)
    add_recommendations(router, service, answers.submit)
    add_search(router, service, answers.submit)
    add_items(router, service, answers.submit)
    return router


def _events(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    writes = Batcher(service.append, max_batch=MAX_EVENT_BATCH, max_waiting=service.max_waiting)

    @router.post("/events", response_model=EventsResponse, summary="Keep what users did")
    async def events(body: EventsRequest) -> Response:
        started_s = time.perf_counter()
        item_ids = [event.item_id for event in body.events]

        def told(written: asyncio.Task[None]) -> None:
            took_ms = 1e3 * (time.perf_counter() - started_s)
            error = None if written.cancelled() else written.exception()
            if not written.cancelled() and error is None:
                service.watch.accepted(service.model.version, item_ids, took_ms)
            elif isinstance(error, DeadlineError):
                service.watch.late(took_ms)

        writing = asyncio.create_task(writes.submit(_stored(body)))
        writing.add_done_callback(told)
        await asyncio.shield(writing)  # the slowest events outlive their requests, and count all the same
        unknown = sum(item_id not in service.model.catalogue for item_id in item_ids)
        response = EventsResponse(
            accepted=len(body.events),
            unknown_items=unknown,
            model_version=service.model.version,
            timings_ms=timings(started_s, {}),
        )
        return _json(response)

    return router


def _health(service: Service) -> APIRouter:
    router = APIRouter()

    async def trial() -> None:
        popular, _ = service.model.catalogue.label(1)  # past the batcher: a full queue is busy, not broken
        await service.recommend([Request(k=1, user_id="", history=(popular,))])

    readiness = Readiness(trial, READY_TIMEOUT_S)

    @router.get("/healthz", summary="The process answers")
    async def healthz() -> HealthResponse:
        return HealthResponse(status="ok", model_version=service.model.version)

    @router.get("/readyz", summary="The event store and the model answer")
    async def readyz() -> HealthResponse:
        await readiness.require()
        refused = [
            "/".join(uri.rstrip("/").split("/")[-2:]) for uri in service.refused()
        ]  # places are nobody's business
        return HealthResponse(status="ready", model_version=service.model.version, refused=refused)

    return router


def _add_problems(app: FastAPI) -> None:
    """Every error of a known kind leaves as problem+json; `Guard` answers for the others."""

    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(EventStoreError)
    async def event_store_error(_: HttpRequest, error: EventStoreError) -> Response:
        _LOGGER.error("%s", error)
        return respond(UnavailableError("the event store does not answer"))

    @app.exception_handler(ItemStoreError)
    async def item_store_error(_: HttpRequest, error: ItemStoreError) -> Response:
        _LOGGER.error("%s", error)
        return respond(UnavailableError("the item store does not answer"))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        if any(entry["loc"] == ("query", "q") and entry["type"] in _NO_TEXT for entry in error.errors()):
            return respond(MissingQueryError("give q, the text to search for; /v1/recommend needs none"))
        return ProblemResponse(_invalid(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: HttpRequest, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        detail = str(error.detail)[:_MAX_SHOWN_CHARACTERS]
        return ProblemResponse(problem(error.status_code, f"http-{error.status_code}", detail, detail), headers)


def _invalid(error: RequestValidationError) -> dict[str, Any]:
    found = error.errors()
    if any(entry["type"] == "json_invalid" for entry in found):
        return problem(400, "malformed-json", "The body is no JSON", str(found[0]["ctx"]["error"]))
    shown = [
        {
            "field": ".".join(map(str, entry["loc"]))[:_MAX_SHOWN_CHARACTERS],
            "message": str(entry["msg"])[:_MAX_SHOWN_CHARACTERS],
        }
        for entry in found[:_MAX_SHOWN_ERRORS]
    ]
    detail = f"{shown[0]['field']}: {shown[0]['message']}" + (f" (and {len(found) - 1} more)" if found[1:] else "")
    return problem(422, "invalid-request", "A field does not fit", detail, shown)


def _stored(body: EventsRequest) -> list[StoredEvent]:
    now_s = int(time.time())
    return [
        StoredEvent(
            user_id=event.user_id,
            item_id=event.item_id,
            timestamp=now_s if event.timestamp is None else event.timestamp,
            event_type=event.event_type,
            event_id=event.event_id,
        )
        for event in body.events
    ]


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
