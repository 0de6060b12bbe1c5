"""The answer of `/healthz` and `/readyz`."""

from typing import Literal

from pydantic import BaseModel, Field


class HealthResponse(BaseModel):
    """The state of a replica."""

    status: Literal["ok", "ready"]
    model_version: str
    refused: list[str] = Field(default=[], description="bundles that this replica was told to serve and does not")
