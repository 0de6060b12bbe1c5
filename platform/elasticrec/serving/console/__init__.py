"""The console: a page of three files, served as they are."""

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Final

from fastapi import APIRouter
from starlette.responses import Response

PATHS: Final = {
    "/console": ("console.html", "text/html; charset=utf-8"),
    "/console/console.css": ("console.css", "text/css; charset=utf-8"),
    "/console/console.js": ("console.js", "text/javascript; charset=utf-8"),
}
# Nothing but these files, and questions to the service that they came from.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def console() -> APIRouter:
    """Open to everybody; what it asks for is not."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in PATHS.items():
        content = (resources.files(__name__) / name).read_bytes()
        router.add_api_route(path, _file(content, kind), methods=["GET"])
    return router


def _file(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return file
