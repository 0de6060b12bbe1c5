"""The answer of `/v1/search`."""

from pydantic import BaseModel, Field


class FoundItem(BaseModel):
    """One item that a search found."""

    item_id: str
    title: str | None
    score: float = Field(description="how well text and taste fit, 1 at most; of one answer only")


class SearchResponse(BaseModel):
    """Items whose title or categories match, best first."""

    items: list[FoundItem]
    personal: bool = Field(description="whether the user's taste had a say")
    model_version: str
    timings_ms: dict[str, float]
