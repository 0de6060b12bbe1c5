"""Bodies of `/v1/items/{id}`: an item as it is put and as it is shown, and those that are like it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from elasticrec.serving.api.fields import Entry, Seconds, Whole
from elasticrec.serving.api.limits import (
    MAX_ITEM_ATTRIBUTES,
    MAX_ITEM_CATEGORIES,
    MAX_TIMESTAMP_S,
    MAX_TITLE_CHARACTERS,
    MAX_VECTOR,
)
from elasticrec.serving.api.recommendations import RecommendedItem
from elasticrec.serving.filters import Name, Value


class PutItem(BaseModel):
    """An item as it is from now on; what is left out it has not."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    title: str | None = Field(default=None, max_length=MAX_TITLE_CHARACTERS)
    categories: list[Name] = Field(default=[], max_length=MAX_ITEM_CATEGORIES)
    attributes: dict[Name, Value] = Field(default={}, max_length=MAX_ITEM_ATTRIBUTES)
    published: Seconds | None = Field(default=None, description="seconds since the epoch, for freshness")
    interactions: Whole = Field(
        default=0, ge=0, le=MAX_TIMESTAMP_S, description="where a new item stands among the popular ones"
    )
    vector: list[Entry] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_VECTOR,
        description="as the model's content tower was fitted with, of text or pictures; 409 where it does not fit",
    )


class ItemResponse(BaseModel):
    """What the catalogue knows of an item."""

    item_id: str
    title: str | None
    categories: list[str]
    attributes: dict[str, str | bool | float]
    interactions: int = Field(description="events of the item in the training data")
    model_version: str
    timings_ms: dict[str, float]


class SimilarResponse(BaseModel):
    """The items most like one, best first; the score is the cosine of the model's vectors."""

    item_id: str
    items: list[RecommendedItem]
    source: Literal["model", "popularity"] = Field(
        description="popularity: the model has no vector of the item, so these are popular ones of its categories"
    )
    model_version: str
    timings_ms: dict[str, float]
