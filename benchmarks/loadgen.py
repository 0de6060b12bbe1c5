"""A plan as JSON on stdin; requests from one process over raw sockets; what came of them as JSON on stdout.

    echo '{"port": 8000, "connections": 64, "seconds": 10, "bodies": [...]}' | python -m benchmarks.loadgen

It builds requests once and reads no more of an answer than status and length, so that two cores go to the service. A
connection that ends under way is made again and its request sent once more: the one retry that results may rest on.
With `writes`, every tenth request is an event of its own id; those that were acknowledged are told.

`python -m benchmarks.loadgen echo PORT` is a server that answers at once: what the generator itself can do.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import uvloop

EVERY = 10
USER_EVENTS = 200
HANG_S = 30.0
ANSWER = b'{"items": []}'


@dataclass(kw_only=True)
class Plan:
    """`pace_s`: each connection sends at moments that lie so far apart, or when an answer is there if it is 0.

    The moments of all connections are spread evenly. One at which an answer is still awaited is left out, so callers
    whom one stall has stopped do not go on in step with each other.
    """

    port: int
    connections: int
    seconds: float
    bodies: list[str] = field(default_factory=lambda: ["{}"])
    path: str = "/v1/recommend"
    headers: dict[str, str] = field(default_factory=dict)
    pace_s: float = 0.0
    warm_s: float = 0.0
    writes: bool = False
    mark: str = "load"  # of users and event ids, so that runs do not meet


class Load:
    """What all connections share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.head = "".join(f"{name}: {value}\r\n" for name, value in plan.headers.items())
        self.requests = [self.request(plan.path, body) for body in plan.bodies]
        self.latency_ms: list[float] = []
        self.answered_s: list[float] = []  # after `from_s`
        self.statuses: Counter[int] = Counter()
        self.degraded = 0
        self.failures: list[str] = []
        self.retried = 0
        self.acknowledged: list[tuple[str, str]] = []
        self.sent = 0
        self.left_out = 0  # moments at which an answer was still awaited
        self.written = 0
        self.began_s = time.perf_counter()
        self.from_s = self.began_s + plan.warm_s
        self.until_s = self.from_s + plan.seconds

    def request(self, path: str, body: str) -> bytes:
        raw = body.encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{self.head}"
        return f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw

    def next(self) -> tuple[bytes, tuple[str, str] | None]:
        self.sent += 1
        if self.plan.writes and self.sent % EVERY == 0:
            number = self.written
            self.written += 1
            event = (f"{self.plan.mark}-{number // USER_EVENTS}", f"e{number}")
            body = {"user_id": event[0], "item_id": event[1], "event_id": event[1], "event_type": "click"}
            return self.request("/v1/events", json.dumps({"events": [body]})), event
        return self.requests[self.sent % len(self.requests)], None


class Connection(asyncio.Protocol):
    """Sends the next request when the answer to the last one is whole."""

    def __init__(self, load: Load, done: "asyncio.Future[None]", number: int) -> None:
        self._load, self._done = load, done
        self._turn_s = load.began_s + load.plan.pace_s * number / load.plan.connections  # the next moment to send at
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._request: bytes | None = None
        self._event: tuple[str, str] | None = None
        self._again = False
        self._began_s = 0.0
        self._pause: asyncio.TimerHandle | None = None  # until the next request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        self._buffer.clear()
        if self._request is not None:
            self._transport.write(self._request)
        elif self._pause is None:  # a server may close a connection that rests
            self._next_in_turn()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        place = head.find(b"content-length:")
        length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
        if len(self._buffer) < end + 4 + length:
            return
        self._answered(int(head[9:12]), bytes(self._buffer[end + 4 : end + 4 + length]))

    def _answered(self, status: int, body: bytes) -> None:
        load, now_s = self._load, time.perf_counter()
        if now_s >= load.from_s:
            load.latency_ms.append(1e3 * (now_s - self._began_s))
            load.answered_s.append(now_s - load.from_s)
            load.statuses[status] += 1
            load.degraded += b'"degraded":true' in body
            if status >= 400 and status != 429 and len(load.failures) < 1_000:
                load.failures.append(f"{status} {body[:200].decode(errors='replace')}")
        if status == 200 and self._event is not None:
            load.acknowledged.append(self._event)
        self._request, self._event, self._again = None, None, False
        self._buffer.clear()
        self._next_in_turn()

    def _next_in_turn(self) -> None:
        pace_s, now_s = self._load.plan.pace_s, time.perf_counter()
        if pace_s == 0:
            self._next()
            return
        while self._turn_s < now_s:
            self._turn_s += pace_s
            self._load.left_out += now_s < self._load.until_s
        self._pause = asyncio.get_running_loop().call_later(self._turn_s - now_s, self._next)

    def _next(self) -> None:
        self._pause = None
        if time.perf_counter() >= self._load.until_s:
            if self._transport is not None:
                self._transport.close()
            if not self._done.done():
                self._done.set_result(None)
            return
        if self._transport is None or self._transport.is_closing():
            return  # connection_lost makes another one
        self._request, self._event = self._load.next()
        self._turn_s += self._load.plan.pace_s  # here and not later: a timer may fire a little early
        self._began_s = time.perf_counter()
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._done.done():
            return
        if self._request is not None:
            if self._again:
                self._load.failures.append(f"the connection ended twice under one request ({error!r})")
                self._request, self._event, self._again = None, None, False
            else:
                self._load.retried += 1
                self._again = True
        asyncio.get_running_loop().create_task(self.connect())

    async def connect(self) -> None:
        deadline_s = time.perf_counter() + HANG_S
        while True:
            try:
                await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._load.plan.port)
                return
            except OSError as error:
                if time.perf_counter() > deadline_s:
                    self._load.failures.append(f"no connection for {HANG_S:g} s ({error!r})")
                    self._done.set_result(None)
                    return
                await asyncio.sleep(0.05)


async def run(plan: Plan) -> dict[str, Any]:
    load = Load(plan)
    loop = asyncio.get_running_loop()
    done = [loop.create_future() for _ in range(plan.connections)]
    connections = [Connection(load, future, number) for number, future in enumerate(done)]
    await asyncio.gather(*(connection.connect() for connection in connections))
    _, hanging = await asyncio.wait(done, timeout=plan.warm_s + plan.seconds + HANG_S)
    load.failures += ["no answer for 30 s"] * len(hanging)
    latency_ms = np.asarray(load.latency_ms or [0.0])
    p50, p99, p999 = np.percentile(latency_ms, [50, 99, 99.9])
    return {
        "requests": len(load.latency_ms), "per_s": len(load.latency_ms) / plan.seconds, "p50_ms": float(p50),
        "p99_ms": float(p99), "p999_ms": float(p999), "max_ms": float(latency_ms.max()),
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "degraded": load.degraded, "failed": len(load.failures), "failures": load.failures[:5],
        "retried": load.retried, "sent": load.sent, "left_out": load.left_out, "acknowledged": load.acknowledged,
        "p99_ms_by_second": _by_second(load.answered_s, load.latency_ms),
    }  # fmt: skip


def _by_second(answered_s: list[float], latency_ms: list[float]) -> list[float]:
    """The 99th percentile of what was answered in each second; 0 where nothing was."""
    second, found_ms = np.asarray(answered_s).astype(int), np.asarray(latency_ms)
    of_each = [found_ms[second == number] for number in range(second.max() + 1)] if len(second) else []
    return [float(np.percentile(some_ms, 99)) if len(some_ms) else 0.0 for some_ms in of_each]


class Echo(asyncio.Protocol):
    """Answers every piece of data as if it were one request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, _: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER))


async def echo(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


def main() -> None:
    if sys.argv[1:2] == ["echo"]:
        uvloop.run(echo(int(sys.argv[2])))
        return
    print(json.dumps(uvloop.run(run(Plan(**json.load(sys.stdin))))))


if __name__ == "__main__":
    main()
