"""Raw HTTP requests in; only those that bring a key (where keys are configured) and a small body reach the app."""

import json
from typing import Any

from starlette._utils import get_route_path  # what the router matches: both must see the same path
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elasticrec.serving.api import MAX_BODY_BYTES, ApiError, BodyTooLargeError, UnauthorizedError
from elasticrec.serving.auth import KeyRing, key_in

# Everything else needs a key, so that a new route, or a prefix nobody thought of, is closed and not open.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
_MAX_DRAINED_BYTES = 64 * MAX_BODY_BYTES


class ProblemResponse(Response):
    """application/problem+json; pure ASCII, since what a client sent may not be valid UTF-8."""

    media_type = "application/problem+json"

    def __init__(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(json.dumps(body, ensure_ascii=True), status_code=body["status"], headers=headers)


def respond(error: ApiError) -> ProblemResponse:
    """The answer that an error is."""
    return ProblemResponse(error.problem(), dict(error.headers))


class Guard:
    """ASGI middleware: 401 before the body is read, 413 before it is parsed."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_key(get_route_path(scope), headers)
            body = await _read_body(receive)
        except ApiError as error:
            await respond(error)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        """`path`: without the prefix (root_path) under which the app is mounted."""
        if self._keys is None or path in OPEN_PATHS:
            return
        key = key_in(headers)
        if key is None:
            raise UnauthorizedError("no API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        if self._keys.name_of(key) is None:
            raise UnauthorizedError("this API key is not known here; it may have been revoked")


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; none when the client left.

    Raises:
        BodyTooLargeError: it has more than MAX_BODY_BYTES. It is read to its end, or many clients would see a
            broken connection in place of the answer.
    """
    parts: list[bytes] = []
    size_bytes = 0
    while size_bytes <= _MAX_DRAINED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size_bytes += len(message.get("body", b""))
        if size_bytes <= MAX_BODY_BYTES:
            parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    if size_bytes > MAX_BODY_BYTES:
        raise BodyTooLargeError(f"the body has more than {MAX_BODY_BYTES} bytes; send less in one request")
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, and then whatever comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed
