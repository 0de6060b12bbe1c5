"""For operators with the scope `admin`: what one replica holds, what its versions answer, and moves of labels."""

import asyncio
import time
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query

from elasticrec.serving.api.limits import MAX_ID_CHARACTERS, MAX_K
from elasticrec.serving.api.operators import CompareResponse, MoveRequest, MoveResponse, UsersResponse, VersionsResponse
from elasticrec.serving.api.problems import NothingToMoveError, Problem
from elasticrec.serving.api.recommendations import RecommendedItem
from elasticrec.serving.history import Request
from elasticrec.serving.lookups import Lookups
from elasticrec.serving.moves import Moves
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.service import Service

MAX_USERS: Final = 100
_NOT_MOVED: Final[dict[int | str, dict[str, Any]]] = {
    409: {"model": Problem, "description": "The service follows no label, or a replica refuses the version"}
}
UserId = Annotated[str, Query(min_length=1, max_length=MAX_ID_CHARACTERS)]


def admin(service: Service) -> APIRouter:
    """Everything below `/v1/admin`."""
    router = APIRouter(prefix="/v1/admin")
    lookups = Lookups()

    @router.get("/replica", summary="Versions, refused bundles, shadow and queue of the replica that answers")
    async def replica() -> dict[str, Any]:
        return service.state()

    @router.get("/users", summary="Users whose id begins so, or some of them")
    async def users(
        prefix: Annotated[str, Query(max_length=MAX_ID_CHARACTERS)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_USERS)] = 20,
    ) -> UsersResponse:
        find = service.events.users
        return UsersResponse(user_ids=await lookups.ask(lambda: find(prefix, limit)))

    @router.get("/compare", summary="What production, canary and shadow answer to one user")
    async def compare(user_id: UserId, k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> CompareResponse:
        answers = {}
        for role, (version, ask) in service.roles().items():
            started_s = time.perf_counter()
            (answer,) = await ask([Request(k=k, user_id=user_id)])
            answers[role] = _shown(version, answer, 1e3 * (time.perf_counter() - started_s))
        return CompareResponse(user_id=user_id, answers=answers)

    @router.get("/versions", responses=_NOT_MOVED, summary="Versions and labels of the model that is served")
    async def versions() -> VersionsResponse:
        return VersionsResponse(**await asyncio.to_thread(_moves(service).versions))

    @router.post("/versions", responses=_NOT_MOVED, summary="Move production or the canary, and the application along")
    async def move(body: MoveRequest) -> MoveResponse:
        return MoveResponse(told=await _moves(service).make(body))

    return router


def _moves(service: Service) -> Moves:
    if service.moves is None:
        raise NothingToMoveError(
            "this service answers by one bundle; deploy it from REGISTRY#NAME@LABEL to move labels"
        )
    return service.moves


def _shown(version: str, answer: Recommendation, took_ms: float) -> dict[str, Any]:
    items = [RecommendedItem(item_id=item.item_id, title=item.title, score=item.score) for item in answer.items]
    return {"model_version": version, "items": items, "source": answer.source, "took_ms": round(took_ms, 3)}
