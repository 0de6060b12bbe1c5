"""A user's id in; their events with titles out, or none left: history and erasure over HTTP."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Annotated, Final, TypeVar

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from elasticrec.serving.api.limits import MAX_ID_CHARACTERS
from elasticrec.serving.api.problems import UnavailableError
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.events import ErasurePendingError, EventStore
from elasticrec.serving.whole_ids import take_whole_ids

MAX_SHOWN: Final = 1_000
_PENDING: Final = "the user's events are removed, but the store's log may still hold them; repeat the call"
T = TypeVar("T")
UserId = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARACTERS)]


class UserEvent(BaseModel):
    """One event; no title where the catalogue does not know the item."""

    item_id: str
    title: str | None
    event_type: str | None
    timestamp: int = Field(description="seconds since the epoch; 0 where the data set has no times")


class UserResponse(BaseModel):
    """The newest events of a user, oldest first: those of the data set, then live ones as they arrived."""

    user_id: str
    events: list[UserEvent]
    total: int = Field(description="events that are kept of this user")


class ErasureResponse(BaseModel):
    """Nothing of the user is kept any more, and no data set that is loaded later brings them back."""

    erased: int


def users(catalogue: Callable[[], Catalogue], events: EventStore, thread: Executor) -> APIRouter:
    """`catalogue`: that of the version in production at the moment. `thread`: where events are written, in order;
    erasures have one of their own, since they may have to wait and events must not."""
    take_whole_ids()
    router = APIRouter(prefix="/v1")
    erasures = ThreadPoolExecutor(1, thread_name_prefix="erasures")

    async def run(where: Executor, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(where, function)

    @router.get("/users/{user_id:path}", summary="What a user did")
    async def history(user_id: UserId, limit: Annotated[int, Query(ge=1, le=MAX_SHOWN)] = 100) -> UserResponse:
        newest, total = await run(thread, lambda: (events.newest(user_id, limit), events.count(user_id)))
        find = catalogue().find
        shown = [
            UserEvent(
                item_id=event.item_id,
                title=item.title if (item := find(event.item_id)) else None,
                event_type=event.event_type,
                timestamp=event.timestamp,
            )
            for event in newest
        ]
        return UserResponse(user_id=user_id, events=shown, total=total)

    @router.delete("/users/{user_id:path}", summary="Erase all events of a user, for good")
    async def erase(user_id: UserId) -> ErasureResponse:
        await run(thread, lambda: None)  # events that wait there were first, and must not come after
        try:
            return ErasureResponse(erased=await run(erasures, lambda: events.erase(user_id)))
        except ErasurePendingError as error:
            raise UnavailableError(_PENDING) from error

    return router
