"""JSON bodies in, checked requests out; answers and problems as the API shows them (OpenAPI is made from these)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from elasticrec.errors import ElasticRecError
from elasticrec.serving.filters import Filters, Name, Value

MAX_K: Final = 200
MAX_HISTORY: Final = 1_000
MAX_EXCLUDE: Final = 1_000
MAX_OFFSET: Final = 1_000
MAX_BOOSTS: Final = 100
MAX_FACTOR: Final = 1_000.0
MAX_BATCH_USERS: Final = 10_000
MAX_BATCH_ITEMS: Final = 200_000  # users times k
CURSOR: Final = "^[A-Za-z0-9_-]{16}$"
VERSION: Final = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
MAX_QUERY_CHARACTERS: Final = 256
MAX_TITLE_CHARACTERS: Final = 1_000
MAX_ITEM_CATEGORIES: Final = 100
MAX_ITEM_ATTRIBUTES: Final = 50
MAX_VECTOR: Final = 8_192
MAX_ENTRY: Final = 1e6  # of a vector: its products stay finite in float32
MAX_EVENTS: Final = 1_000
MAX_ID_CHARACTERS: Final = 256
MAX_BODY_BYTES: Final = 1 << 20
MAX_TIMESTAMP_S: Final = 1 << 53  # integers that every JSON reader keeps exactly
PROBLEM_TYPE: Final = "https://elasticrec.dev/problems/"  # a name, not a page that is fetched

Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARACTERS)]


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Entry = Annotated[float, Field(ge=-MAX_ENTRY, le=MAX_ENTRY, allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_whole)]
Seconds = Annotated[int, Field(ge=0, le=MAX_TIMESTAMP_S), BeforeValidator(_whole)]  # since the epoch


def _needs(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema of an object that has this field, and not as null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


def _wish(action: str, **kinds: str) -> dict[str, Any]:
    """JSON Schema of an object with this action: which fields are there, and which are not."""
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    needed = [name for name, kind in kinds.items() if kind != "null"]
    return {"properties": {"action": {"const": action}, **properties}, "required": ["action", *needed]}


class Boost(BaseModel):
    """Multiplies the odds of an item, or of all items of a category; below 1 it holds them back."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"oneOf": [_needs("item_id", "string"), _needs("category", "string")]},
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
            "anyOf": [_needs("user_id", "string"), _needs("history", "array")],
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


class SimilarResponse(BaseModel):
    """The items most like one, best first; the score is the cosine of the model's vectors."""

    item_id: str
    items: list[RecommendedItem]
    source: Literal["model", "popularity"] = Field(
        description="popularity: the model has no vector of the item, so these are popular ones of its categories"
    )
    model_version: str
    timings_ms: dict[str, float]


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


class ItemResponse(BaseModel):
    """What the catalogue knows of an item."""

    item_id: str
    title: str | None
    categories: list[str]
    attributes: dict[str, str | bool | float]
    interactions: int = Field(description="events of the item in the training data")
    model_version: str
    timings_ms: dict[str, float]


class UsersResponse(BaseModel):
    """Ids of users with events."""

    user_ids: list[str]


class VersionAnswer(BaseModel):
    """What one version answers."""

    model_version: str
    items: list[RecommendedItem]
    source: Literal["model", "popularity"]
    took_ms: float


class CompareResponse(BaseModel):
    """The answer of each version that has a role: production, canary, shadow."""

    user_id: str
    answers: dict[str, VersionAnswer]


class VersionsResponse(BaseModel):
    """A model of the registry."""

    name: str
    versions: list[str]
    labels: dict[str, str]


class MoveRequest(BaseModel):
    """`promote` and `rollback` move production; `canary` gives a version a share of the users, 0 ends it."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "oneOf": [
                _wish("promote", version="string", percent="null"),
                _wish("canary", version="string", percent="number"),
                _wish("rollback", version="null", percent="null"),
            ]
        },
    )

    action: Literal["promote", "rollback", "canary"]
    version: str | None = Field(default=None, pattern=VERSION, max_length=64, description="of promote and canary")
    percent: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, description="of canary")
    reason: str = Field(default="console", max_length=200, pattern=r"^\w[^\x00-\x1f]*$")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.version is None) != (self.action == "rollback"):
            raise ValueError("promote and canary need a version, rollback has none")
        if (self.percent is None) == (self.action == "canary"):
            raise ValueError("canary needs percent, the others have none")
        return self


class MoveResponse(BaseModel):
    """The label has moved, and every replica answers by it."""

    told: str


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


class OtherVectorError(ApiError):
    """The model reads vectors of another length, or none."""

    status = 409
    kind = "other-vector"
    title = "The vector does not fit the model"


class RepeatedParameterError(ApiError):
    """A query names a value twice, and only one is meant to be there."""

    status = 422
    kind = "repeated-parameter"
    title = "A parameter is given twice"


class MissingQueryError(ApiError):
    """A search for nothing."""

    status = 400
    kind = "missing-query"
    title = "What to search for?"


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


class MoveRefusedError(ApiError):
    """A version was not taken; what was live stays."""

    status = 409
    kind = "move-refused"
    title = "The label was not moved"


class NothingToMoveError(ApiError):
    """The service follows no label."""

    status = 409
    kind = "no-label"
    title = "The service follows no label"


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
