"""The OpenAPI document that FastAPI makes in, one that says what really comes back out."""

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI

from elasticrec.serving.api.problems import Problem

_PROBLEM: Final = f"#/components/schemas/{Problem.__name__}"
_NO_PATH: Final = {
    "description": "No such path",
    "content": {"application/problem+json": {"schema": {"$ref": _PROBLEM}}},
}


_KEY: Final = {"HTTPBearer": {"type": "http", "scheme": "bearer", "description": "an API key"}}


def documented(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """In place of `app.openapi`, which cannot be told of application/problem+json and of the key that `Guard` wants."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        document["components"]["securitySchemes"] = _KEY
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if path.startswith("/v1/"):
                    operation["security"] = [{scheme: [] for scheme in _KEY}]
                if "{" in path:  # many clients take the id ".." for a step up
                    operation["responses"].setdefault("404", _NO_PATH)
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    if content.get("application/json", {}).get("schema") == {"$ref": _PROBLEM}:
                        content["application/problem+json"] = content.pop("application/json")
        return document

    return openapi
