"""JSON bodies in, checked requests out; answers and problems as the API shows them (OpenAPI is made from these)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from elasticrec.errors import ElasticRecError

MAX_K: Final = 200
MAX_HISTORY: Final = 1_000
MAX_EXCLUDE: Final = 1_000
MAX_EVENTS: Final = 1_000
MAX_ID_CHARACTERS: Final = 256
MAX_BODY_BYTES: Final = 1 << 20
MAX_TIMESTAMP_S: Final = 1 << 53  # integers that every JSON reader keeps exactly
PROBLEM_TYPE: Final = "https://elasticrec.dev/problems/"  # a name, not a page that is fetched

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]


class RecommendRequest(BaseModel):
    """Whom to recommend to: a known user, an anonymous history, or both (the history then comes last)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    user_id: Id | None = None
    history: list[Id] | None = Field(default=None, max_length=MAX_HISTORY, description="item ids, oldest first")
    k: int = Field(default=10, ge=1, le=MAX_K)
    exclude: list[Id] = Field(default=[], max_length=MAX_EXCLUDE, description="item ids that are not to be returned")

    @model_validator(mode="after")
    def _knows_somebody(self) -> Self:
        if self.user_id is None and self.history is None:
            raise ValueError("give user_id, history, or both")
        return self


class RecommendedItem(BaseModel):
    """One item of an answer."""

    item_id: str
    title: str | None
    score: float | None = Field(description="the model's score; none in an answer by popularity")


class RecommendResponse(BaseModel):
    """Items, best first; fewer than k only when the catalogue has no more that may be returned."""

    items: list[RecommendedItem]
    source: Literal["model", "popularity"] = Field(description="popularity: no item of the history is known")
    degraded: bool = Field(default=False, description="the model is down or late; what is popular answers instead")
    model_version: str
    history_length: int = Field(description="known items that the answer was made from")
    timings_ms: dict[str, float] = Field(description="time of each stage; a batch shares encode and retrieve")


class Event(BaseModel):
    """Something a user did with an item."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    user_id: Id
    item_id: Id
    event_type: Id | None = None
    event_id: Id | None = Field(default=None, description="the same one again, of the same user, is not kept twice")
    timestamp: int | None = Field(
        default=None, ge=0, le=MAX_TIMESTAMP_S, description="seconds since the epoch; now when left out"
    )


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


class ItemResponse(BaseModel):
    """What the catalogue knows of an item."""

    item_id: str
    title: str | None
    categories: list[str]
    interactions: int = Field(description="events of the item in the training data")
    model_version: str
    timings_ms: dict[str, float]


class HealthResponse(BaseModel):
    """The state of a replica."""

    status: Literal["ok", "ready"]
    model_version: str
    refused: list[str] = Field(default=[], description="bundles that this replica was told to serve and does not")


class InvalidField(BaseModel):
    """One field of a request that does not fit."""

    field: str
    message: str


class Problem(BaseModel):
    """An error as RFC 9457 has it (application/problem+json)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[InvalidField] | None = None


class ApiError(ElasticRecError):
    """Base of the errors that the API answers with; the class says status, kind and title."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"
    title: ClassVar[str] = "The service failed"
    headers: Mapping[str, str] = MappingProxyType({})

    def problem(self) -> dict[str, Any]:
        """The body of the answer."""
        return problem(self.status, self.kind, self.title, str(self))


class UnauthorizedError(ApiError):
    """No API key, or one that is not known."""

    status = 401
    kind = "unauthorized"
    title = "An API key is needed"
    headers = MappingProxyType({"www-authenticate": "Bearer"})


class ItemNotFoundError(ApiError):
    """The catalogue has no such item."""

    status = 404
    kind = "item-not-found"
    title = "There is no such item"


class ForbiddenError(ApiError):
    """The key is known, but not for this."""

    status = 403
    kind = "forbidden"
    title = "The API key has not the scope"


class BadHeaderError(ApiError):
    """A header cannot be read."""

    status = 400
    kind = "bad-header"
    title = "A header does not fit"


class OverloadedError(ApiError):
    """Too many requests; says when to come again."""

    status = 429
    kind = "too-many-requests"
    title = "Too many requests"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.headers = MappingProxyType({"retry-after": str(retry_after_s)})


class DeadlineError(ApiError):
    """The time that the caller allowed was over before the work was done."""

    status = 504
    kind = "deadline-exceeded"
    title = "The request took too long"


class BodyTooLargeError(ApiError):
    """More bytes than a request may have."""

    status = 413
    kind = "body-too-large"
    title = "The body is too large"


class UnavailableError(ApiError):
    """The model or the event store does not answer at the moment."""

    status = 503
    kind = "unavailable"
    title = "The service is not available"
    headers = MappingProxyType({"retry-after": "1"})


def problem(
    status: int, kind: str, title: str, detail: str, errors: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """A problem as plain values."""
    body: dict[str, Any] = {"type": PROBLEM_TYPE + kind, "title": title, "status": status, "detail": detail}
    return body | ({"errors": errors} if errors else {})
