"""Why a request is not answered: errors as the code raises them, and as RFC 9457 shows them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final

from pydantic import BaseModel

from elasticrec.errors import ElasticRecError

PROBLEM_TYPE: Final = "https://elasticrec.dev/problems/"  # a name, not a page that is fetched


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


def problem(
    status: int, kind: str, title: str, detail: str, errors: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """A problem as plain values."""
    body: dict[str, Any] = {"type": PROBLEM_TYPE + kind, "title": title, "status": status, "detail": detail}
    return body | ({"errors": errors} if errors else {})


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
