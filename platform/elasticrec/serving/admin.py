"""What one replica holds and how it fares, for operators with the scope `admin`."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter


def admin(state: Callable[[], dict[str, Any]]) -> APIRouter:
    """`state`: plain values."""
    router = APIRouter(prefix="/v1/admin")

    @router.get("/replica", summary="Versions, refused bundles, shadow and queue of the replica that answers")
    async def replica() -> dict[str, Any]:
        return state()

    return router
