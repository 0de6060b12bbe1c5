"""Bodies of `/v1/events`: what users did."""

from pydantic import BaseModel, ConfigDict, Field

from elasticrec.serving.api.fields import Id, Seconds
from elasticrec.serving.api.limits import MAX_EVENTS


class Event(BaseModel):
    """Something a user did with an item."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    user_id: Id
    item_id: Id
    event_type: Id | None = None
    event_id: Id | None = Field(default=None, description="the same one again, of the same user, is not kept twice")
    timestamp: Seconds | None = Field(default=None, description="seconds since the epoch; now when left out")


class EventsRequest(BaseModel):
    """One or many events; all are kept, or none."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    events: list[Event] = Field(min_length=1, max_length=MAX_EVENTS)


class EventsResponse(BaseModel):
    """The events are on disk, and in every answer from now on."""

    accepted: int
    unknown_items: int = Field(description="events of items that this model does not know; kept, but not used by it")
    model_version: str
    timings_ms: dict[str, float]
