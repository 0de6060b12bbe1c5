"""Bodies of `/v1/admin`: users, versions, what versions answer, and wishes to move them."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elasticrec.serving.api.fields import wish
from elasticrec.serving.api.limits import VERSION
from elasticrec.serving.api.recommendations import RecommendedItem


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
    label: str = Field(description="the one that the application follows: its production")


class MoveRequest(BaseModel):
    """`promote` and `rollback` move production; `canary` gives a version a share of the users, 0 ends it."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "oneOf": [
                wish("promote", version="string", percent="null", leaving="null"),
                wish("canary", version="string", percent="number", leaving="null"),
                wish("rollback", version="null", percent="null"),
            ]
        },
    )

    action: Literal["promote", "rollback", "canary"]
    version: str | None = Field(default=None, pattern=VERSION, max_length=64, description="of promote and canary")
    percent: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, description="of canary")
    leaving: str | None = Field(
        default=None,
        pattern=VERSION,
        max_length=64,
        description="of rollback: refused unless production is at it, so that the same wish sent twice moves once",
    )
    reason: str = Field(default="console", max_length=200, pattern=r"^\w[^\x00-\x1f]*$")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.version is None) != (self.action == "rollback"):
            raise ValueError("promote and canary need a version, rollback has none")
        if (self.percent is None) == (self.action == "canary"):
            raise ValueError("canary needs percent, the others have none")
        if self.leaving is not None and self.action != "rollback":
            raise ValueError("only rollback names the version that it leaves")
        return self


class MoveResponse(BaseModel):
    """The label has moved, and every replica answers by it."""

    told: str
