"""Raw HTTP requests in; only those that may, in time and not too many at once, reach the app; every answer is marked.

In this order: request id, key (401), its rate (429) and scope (403), repeated parameters (422), room (429),
deadline, size of body (413). Room is asked for at the door already, where the key, its scope and its rate allow.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Final

from starlette._utils import get_route_path  # what the router matches: both must see the same path
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elasticrec.monitoring.series import ADMITTED, IN_FLIGHT
from elasticrec.serving import console
from elasticrec.serving.admission import Admission
from elasticrec.serving.api.limits import MAX_BODY_BYTES
from elasticrec.serving.api.problems import (
    ApiError,
    BodyTooLargeError,
    DeadlineError,
    ForbiddenError,
    OverloadedError,
    UnauthorizedError,
)
from elasticrec.serving.audit import Audit, shown
from elasticrec.serving.auth import KeyRing, StoredKey, key_in, scope_of
from elasticrec.serving.deadline import DEADLINE_S, MAX_TIMEOUT_MS, deadline_in
from elasticrec.serving.deadline import HEADER as DEADLINE_HEADER
from elasticrec.serving.door import Door
from elasticrec.serving.meter import Meter
from elasticrec.serving.parameters import require_once
from elasticrec.serving.rate import Rate
from elasticrec.serving.watch import Watch

# Everything else needs a key, so that a new route, or a prefix nobody thought of, is closed and not open.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json", *console.PATHS})
# Thousands of answers take longer than one, and so does a version that all replicas load and check.
BULK_PATHS = frozenset({"/v1/recommend:batch", "/v1/admin/versions"})
_CROWDED: Final = frozenset({("POST", "/v1/recommend"), ("POST", "/v1/events"), ("GET", "/v1/search")})
_MODEL_PATHS: Final = frozenset({"/v1/recommend", "/v1/search"})  # by which it is told how long the model takes
_MEASURED_PATHS: Final = frozenset({"/v1/recommend", "/v1/recommend:batch", "/v1/events", "/v1/search"})
NOBODY: Final = "nobody"  # who calls where no keys are configured
_MAX_DRAINED_BYTES = 64 * MAX_BODY_BYTES
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_CLIENT_GONE: Final = 499  # as web servers count a request whose answer nobody waited for
_GRACE_S: Final = 0.25  # beyond the deadline, in which an answer without the model is still made
_SECURITY: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
_NEVER_STORED: Final = (b"cache-control", b"no-store")
_LOGGER = logging.getLogger("ray.serve")
_FULL: Final = "this replica works on as many requests as it may; come again"
_NO_SCRIPTS: Final = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")  # /docs has its own


class ProblemResponse(Response):
    """application/problem+json; pure ASCII, since what a client sent may not be valid UTF-8."""

    media_type = "application/problem+json"

    def __init__(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(json.dumps(body, ensure_ascii=True), status_code=body["status"], headers=headers)


def respond(error: ApiError) -> ProblemResponse:
    """The answer that an error is."""
    return ProblemResponse(error.problem(), dict(error.headers))


_NO_ROOM: Final = respond(OverloadedError(_FULL))  # made once, sent to many


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What a service allows its callers."""

    max_in_flight: int = 512
    timeout_ms: float = 2_000.0  # for callers that name none
    rate: Rate | None = None
    audit: Audit = field(default_factory=lambda: Audit(None))


class Guard:
    """ASGI middleware: what is refused is refused before the body is parsed, most of it before it is read."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        protection: Protection | None = None,
        watch: Watch | None = None,
        meter: Meter | None = None,
        door: Door | None = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._protection = protection or Protection()
        self._watch = watch or Watch()
        self._watch.ledger.level(IN_FLIGHT, lambda: self.in_flight)
        self._admission = Admission(self._protection.max_in_flight, self._protection.timeout_ms / 1e3)
        self.in_flight = 0
        self._single = 0  # of those whose body has come, but for bulk
        self._meter = meter or Meter()
        self._watch.ledger.level(ADMITTED, lambda: self._admission.limit(time.monotonic()))
        self._prefix = ""  # under which the app is mounted
        if door is not None:
            door.turn_away = self.turn_away

    async def turn_away(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Refuses a request for which there is no room before anything is done for it, and says whether it did.

        What many ask, of callers who may: everything else is told further in, where it is looked at closer.
        """
        path = scope.get("path", "").removeprefix(self._prefix)
        if (scope.get("method"), path) not in _CROWDED or self._has_room(True, time.monotonic()):
            return False
        headers = dict(scope["headers"])
        if not await self._may_ask(headers, scope["method"], path):
            return False
        self._count_refusal(path)
        self._watch.request(path, OverloadedError.status, 0.0)
        await _NO_ROOM(scope, receive, _Marked(send, _request_id(headers), path))
        return True

    async def _may_ask(self, headers: dict[bytes, bytes], method: str, path: str) -> bool:
        """Whether nothing but want of room is against it; it counts for the rate of its key."""
        try:
            key = self._find_key(headers)
            _require_scope(key, method, path)
            if self._protection.rate is not None:
                await self._protection.rate.require(NOBODY if key is None else key.name)
        except Exception:  # noqa: BLE001 - it comes again further in, where it is answered and told
            return False
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        headers, path = dict(scope["headers"]), get_route_path(scope)
        self._prefix = scope.get("root_path", "")
        marked = _Marked(send, _request_id(headers), path)
        who = None
        try:
            if path in OPEN_PATHS:
                await self._pass_on(scope, receive, marked, path)
                return
            key = self._find_key(headers)
            name = NOBODY if key is None else key.name
            await self._require_rate(name)
            who = name  # beyond its rate it must not fill the audit
            _require_scope(key, scope["method"], path)
            if scope["query_string"]:
                require_once(scope["query_string"])
            await self._in_time(scope, receive, marked, headers, path)
            if marked.status == OverloadedError.status:
                self._watch.refused("queue")
                self._count_waiting(path)
        except ApiError as error:
            if isinstance(error, UnauthorizedError):  # whoever has no key must not fill the audit
                self._watch.refused("key")
                _LOGGER.info("refused for its key: %s %s (%s)", scope["method"], shown(path), marked.request_id)
            elif isinstance(error, ForbiddenError):
                self._watch.refused("scope")
            await respond(error)(scope, receive, marked)
        except Exception as error:
            _LOGGER.error("a request failed", exc_info=error)
            if marked.status:  # half of an answer is out
                raise
            await respond(ApiError("the request failed inside the service; its log says why"))(scope, receive, marked)
        finally:
            took_ms = 1e3 * (time.perf_counter() - started_s)
            self._watch.request(_route(scope, path), marked.status or _CLIENT_GONE, took_ms)
            if who is not None and scope_of(scope["method"], path) == "admin":
                await self._protection.audit.keep(who, scope["method"], path, marked.status, marked.request_id)

    async def _require_rate(self, who: str) -> None:
        if self._protection.rate is None:
            return
        try:
            await self._protection.rate.require(who)
        except OverloadedError:
            self._watch.refused("rate")
            raise

    async def _in_time(
        self, scope: Scope, receive: Receive, marked: "_Marked", headers: dict[bytes, bytes], path: str
    ) -> None:
        now_s = time.monotonic()
        default_ms = MAX_TIMEOUT_MS if path in BULK_PATHS else self._protection.timeout_ms
        deadline_s = deadline_in(headers, default_ms, now_s)
        single = path not in BULK_PATHS
        self._require(self._has_room(single, now_s), path)
        self.in_flight += 1
        token = DEADLINE_S.set(deadline_s)
        try:
            async with asyncio.timeout(deadline_s - now_s + _GRACE_S):
                await self._pass_on(scope, receive, marked, path, single=single)
        except TimeoutError:
            if not marked.status:
                raise DeadlineError("the time that the request allowed is over; it may still have its effect") from None
        finally:
            DEADLINE_S.reset(token)
            self.in_flight -= 1
            if path in _MODEL_PATHS and headers.get(DEADLINE_HEADER) is None:
                self._learn(marked)

    def _has_room(self, single: bool, now_s: float) -> bool:
        return self.in_flight < self._protection.max_in_flight and self._lets_in(single, now_s)

    def _lets_in(self, single: bool, now_s: float) -> bool:
        """What is not bulk leaves room sooner."""
        return not single or self._single < self._admission.limit(now_s)

    def _require(self, room: bool, path: str) -> None:
        if not room:
            self._count_refusal(path)
            raise OverloadedError(_FULL)

    def _count_refusal(self, path: str) -> None:
        self._watch.refused("room")
        self._count_waiting(path)

    def _count_waiting(self, path: str) -> None:
        """Of those for whom another replica of the model would help."""
        if path in _MODEL_PATHS:
            self._meter.turned_away()

    def _learn(self, marked: "_Marked") -> None:
        """From callers with as much patience as others, and from what was answered or came too late. A client that is
        slow to send or to read, or mistaken, does not decide how many are let in."""
        if marked.read_s is not None and marked.status in (0, 200, DeadlineError.status):  # 0: no answer in time
            ended_s = marked.told_s or time.monotonic()
            self._admission.answered(ended_s - marked.read_s, ended_s)

    async def _pass_on(
        self, scope: Scope, receive: Receive, marked: "_Marked", path: str, *, single: bool = False
    ) -> None:
        body = await _read_body(receive)
        if body is None:
            return
        marked.read_s = time.monotonic()
        self._require(self._lets_in(single, marked.read_s), path)  # others came while the body did
        self._single += single
        try:
            await self._app(scope, _replay(body, receive), marked)
        finally:
            self._single -= single

    def _find_key(self, headers: dict[bytes, bytes]) -> StoredKey | None:
        """Whose call it is; none where no keys are configured. Raises UnauthorizedError without a key that is known."""
        if self._keys is None:
            return None
        key = key_in(headers)
        if key is None:
            raise UnauthorizedError("no API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        found = self._keys.find(key)
        if found is None:
            raise UnauthorizedError("this API key is not known here; it may have been revoked")
        return found


def _route(scope: Scope, path: str) -> str:
    """What the router matched, without ids; of what never came to it, the path where it is one that clients call."""
    route = scope.get("route")
    if route is not None:
        return str(route.path).replace(":path}", "}")
    return path if path in _MEASURED_PATHS else "other"


def _require_scope(key: StoredKey | None, method: str, path: str) -> None:
    """`path`: without the prefix (root_path) under which the app is mounted."""
    needed = scope_of(method, path)
    if key is not None and needed not in key.scopes:
        raise ForbiddenError(f"this API key has not the scope '{needed}'; ask for one that has")


class _Marked:
    """A `send` that gives every answer its request id and what keeps browsers and caches from doing harm."""

    def __init__(self, send: Send, request_id: str, path: str) -> None:
        self._send = send
        self.request_id = request_id
        self._path = path
        self.status = 0
        self.read_s: float | None = None  # when the body had come, of time.monotonic()
        self.told_s: float | None = None  # when the answer began

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.told_s = message["status"], time.monotonic()
            given = list(message.get("headers", ()))
            names = {name.lower() for name, _ in given}
            given += [(b"x-request-id", self.request_id.encode()), *_SECURITY]
            if b"cache-control" not in names:
                given.append(_NEVER_STORED)
            if self._path in console.PATHS:
                given.append((b"content-security-policy", console.POLICY.encode()))
            elif not self._path.startswith("/docs"):
                given.append(_NO_SCRIPTS)
            message = {**message, "headers": given}
        await self._send(message)


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


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
