"""The OpenAPI document that FastAPI makes in, one that says what really comes back out."""

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI

from elasticrec.serving.api import Problem

_PROBLEM: Final = f"#/components/schemas/{Problem.__name__}"


def documented(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """In place of `app.openapi`: problems are application/problem+json, which FastAPI cannot be told."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for operations in document["paths"].values():
            for operation in operations.values():
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if content.get("application/json", {}).get("schema") == {"$ref": _PROBLEM}:
                        content["application/problem+json"] = content.pop("application/json")
        return document

    return openapi
