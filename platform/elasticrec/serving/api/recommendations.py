"""Bodies of `/v1/recommend` and `/v1/recommend:batch`: whom to recommend to, what items must be like; items out."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elasticrec.serving.api.fields import Id, Whole, needs
from elasticrec.serving.api.limits import (
    CURSOR,
    MAX_BATCH_ITEMS,
    MAX_BATCH_USERS,
    MAX_BOOSTS,
    MAX_EXCLUDE,
    MAX_FACTOR,
    MAX_HISTORY,
    MAX_K,
    MAX_OFFSET,
)
from elasticrec.serving.filters import Filters, Name


class Boost(BaseModel):
    """Multiplies the odds of an item, or of all items of a category; below 1 it holds them back."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"oneOf": [needs("item_id", "string"), needs("category", "string")]},
    )

    item_id: Id | None = None
    category: Name | None = None
    factor: float = Field(ge=1 / MAX_FACTOR, le=MAX_FACTOR, allow_inf_nan=False)

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.item_id is None) == (self.category is None):
            raise ValueError("give item_id or category, one of them")
        return self


class Wishes(BaseModel):
    """What an answer has to be like, whoever asks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    k: Whole = Field(default=10, ge=1, le=MAX_K)
    exclude: list[Id] = Field(default=[], max_length=MAX_EXCLUDE, description="item ids that are not to be returned")
    filters: Filters | None = Field(default=None, description="what items must be; k are found whenever there are")
    boosts: list[Boost] = Field(default=[], max_length=MAX_BOOSTS)
    diversity: float = Field(
        default=0.0, ge=0, le=1, allow_inf_nan=False, description="0: the best first; 1: the least alike"
    )
    remove_seen: bool | None = Field(
        default=None, description="whether items of the history are left out; as the service does when left out"
    )


class RecommendRequest(Wishes):
    """Whom to recommend to: a known user, an anonymous history, or both (the history then comes last)."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [needs("user_id", "string"), needs("history", "array")],
            "not": {
                "required": ["cursor", "offset"],
                "properties": {"cursor": {"type": "string"}, "offset": {"exclusiveMinimum": 0}},
            },
        }
    )

    user_id: Id | None = None
    history: list[Id] | None = Field(default=None, max_length=MAX_HISTORY, description="item ids, oldest first")
    offset: Whole = Field(default=0, ge=0, le=MAX_OFFSET, description="items to skip")
    explain: bool = Field(default=False, description="whether each item comes with the item of the history like it")
    cursor: str | None = Field(
        default=None,
        pattern=CURSOR,
        description="`next_cursor` of the page before; the rest alike",
    )

    @model_validator(mode="after")
    def _knows_somebody(self) -> Self:
        if self.user_id is None and self.history is None:
            raise ValueError("give user_id, history, or both")
        if self.cursor is not None and self.offset:
            raise ValueError("give offset or cursor, one of them")
        return self


class BatchRequest(Wishes):
    """Many known users at once; each gets what `/v1/recommend` would give."""

    user_ids: list[Id] = Field(min_length=1, max_length=MAX_BATCH_USERS)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.user_ids) * self.k > MAX_BATCH_ITEMS:
            raise ValueError(f"user_ids times k is above {MAX_BATCH_ITEMS}; ask in several requests")
        return self


class Reason(BaseModel):
    """The item of the history that is most like the recommended one, by the model's vectors."""

    item_id: str
    title: str | None


class RecommendedItem(BaseModel):
    """One item of an answer."""

    item_id: str
    title: str | None
    score: float | None = Field(description="the model's score; none in an answer by popularity")
    because: Reason | None = Field(default=None, description="where `explain` asked for it, and there is one")


class RecommendResponse(BaseModel):
    """Items, best first; fewer than k only when the catalogue has no more that may be returned."""

    items: list[RecommendedItem]
    source: Literal["model", "popularity"] = Field(description="popularity: no item of the history is known")
    degraded: bool = Field(default=False, description="the model is down or late; what is popular answers instead")
    model_version: str
    history_length: int = Field(description="known items that the answer was made from")
    next_cursor: str | None = Field(default=None, description="for the next page; none where there is none")
    timings_ms: dict[str, float] = Field(description="time of each stage; a batch shares encode and retrieve")


class UserAnswer(BaseModel):
    """The items of one user, best first."""

    user_id: str
    items: list[RecommendedItem]
    source: Literal["model", "popularity"]
    history_length: int


class BatchResponse(BaseModel):
    """An answer for each user, in the order of the request."""

    results: list[UserAnswer]
    model_version: str
    timings_ms: dict[str, float]
