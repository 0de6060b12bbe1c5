"""Hostile requests against the graph as it is served (a private cluster, Serve, HAProxy): no 5xx, no trace, no hang.

First what schemathesis makes of the service's own OpenAPI document, requests that fit it and that do not; then a corpus
made by lot from a fixed seed: broken and deep JSON, NaN, huge numbers, wrong types, lone surrogates, large bodies, odd
paths, queries, headers and methods, and raw bytes that are no HTTP. The service must answer each within TIMEOUT_S, or
close the connection of what is no HTTP, and be ready at the end.

    python -m benchmarks.fuzz --json benchmarks/results/fuzz_epyc-2core.json
"""

import asyncio
import json
import random
import socket
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pyarrow as pa
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from benchmarks.result import Check, options, publish
from elasticrec.artifact.bundle import write_bundle
from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.cli.service import deploy, is_ready
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.auth import create_key

REQUESTS, QUICK_REQUESTS = 12_000, 1_500
EXAMPLES, QUICK_EXAMPLES = 60, 10  # of schemathesis, for each operation and mode
TIMEOUT_S: Final = 20.0
AT_ONCE: Final = 16
N_ITEMS: Final = 200
TRACES: Final = (b"Traceback (most recent", b'File "/', b"site-packages")
POSTS: Final = ("/v1/recommend", "/v1/recommend:batch", "/v1/events")
GETS: Final = ("/v1/search", "/v1/items/i1", "/v1/items/i1/similar", "/healthz", "/readyz", "/openapi.json", "/docs")
FIELDS: Final = ("user_id", "user_ids", "history", "k", "offset", "cursor", "exclude", "filters", "boosts", "diversity",
                 "remove_seen", "events", "title", "categories", "attributes", "published", "interactions", "x")  # fmt: skip  # noqa: E501


@dataclass(kw_only=True)
class Tally:
    """What came back, by kind of request."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    server_errors: list[str] = field(default_factory=list)
    traces: int = 0
    hangs: int = 0
    slowest_s: float = 0.0

    def count(self, kind: str, status: str) -> None:
        self.statuses.setdefault(kind, Counter())[status] += 1

    def answer(self, kind: str, status: int, body: bytes, what: str) -> None:
        """One answer."""
        self.count(kind, str(status))
        if status >= 500:
            self.server_errors.append(f"{kind}: {status}: {what[:200]}")
        if any(trace in body for trace in TRACES):
            self.traces += 1


def odd_text(rng: random.Random) -> str:
    """Text that trips naive code."""
    return rng.choice(
        ["", " ", "\x00", "é" * 3, "\u202e\u0301", "日本語", "'; DROP TABLE events; --", "../../etc/passwd", "%s%n",
         "🦀", "\ufeff", "a" * 257, "x" * 5_000, "{{7*7}}", "\r\nSet-Cookie: a=b", "null", "NaN", "i1", "ann"]
    )  # fmt: skip


def odd_value(rng: random.Random, depth: int = 0) -> Any:  # noqa: PLR0911
    """Any JSON value, and some that only lax parsers take."""
    kinds = ["text", "number", "odd", "none", "bool"] + (["list", "object"] if depth < 4 else [])
    match rng.choice(kinds):
        case "text":
            return odd_text(rng)
        case "number":
            return rng.choice([0, -1, 1, 5, 2**31, 2**63, 2**64, -(2**63), 1e308, -0.0, 0.5, 1e-320, 10**30])
        case "odd":
            return rng.choice([float("nan"), float("inf"), float("-inf"), 10**400])
        case "bool":
            return rng.random() < 0.5
        case "list":
            return [odd_value(rng, depth + 1) for _ in range(rng.randint(0, 6))]
        case "object":
            return {rng.choice([*FIELDS, odd_text(rng)]): odd_value(rng, depth + 1) for _ in range(rng.randint(0, 5))}
        case _:
            return None


def nearly_right(rng: random.Random, path: str) -> dict[str, Any]:
    """A body that fits, with one or two fields replaced."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/recommend": {"user_id": "ann", "history": ["i1"], "k": 5, "filters": {"categories": {"any": ["drama"]}},
                          "boosts": [{"item_id": "i2", "factor": 2.0}], "diversity": 0.5},
        "/v1/recommend:batch": {"user_ids": ["ann", "bob"], "k": 5},
        "/v1/events": {"events": [{"user_id": "ann", "item_id": "i1"}]},
    }  # fmt: skip
    body = bodies.get(path, {"title": "A", "categories": ["drama"], "attributes": {"a": 1.0}})
    for _ in range(rng.randint(1, 2)):
        body[rng.choice(FIELDS)] = odd_value(rng)
    return body


def body_of(rng: random.Random, path: str) -> tuple[str, bytes]:  # noqa: PLR0911
    """Kind and bytes of one body."""
    match rng.randint(0, 9):
        case 0:
            raw = json.dumps(nearly_right(rng, path)).encode()
            return "broken JSON", raw[: rng.randrange(len(raw))] + rng.choice([b"", b"\xff", b"}", b"\x00", b",,"])
        case 1:
            depth = rng.choice([50, 1_000, 50_000])
            opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
            return "deep nesting", b'{"history":' + opening * depth + b"1" + closing * depth + b"}"
        case 2:
            digits = rng.choice([20, 400, 4_301, 20_000])
            return "huge numbers", b'{"user_id":"a","k":' + b"9" * digits + b"}"
        case 3:
            return "lone surrogates", b'{"user_id":"\\ud800","history":["\\udfff\\ud800"],"events":"\\udc00"}'
        case 4:
            return "random bytes", rng.randbytes(rng.randint(0, 200))
        case 5:
            many = rng.choice([1_001, 20_000])
            name = rng.choice(["history", "exclude", "user_ids", "events"])
            return "long lists", json.dumps({"user_id": "a", name: ["i1"] * many}).encode()
        case 6 if rng.random() < 0.03:
            return "10 MB bodies", b'{"user_id":"' + b"x" * 10_000_000 + b'"}'
        case _:
            return "wrong values", json.dumps(nearly_right(rng, path)).encode()


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One request of the corpus; `raw`: bytes for the socket in place of HTTP."""

    kind: str
    method: str = "GET"
    path: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    raw: bytes | None = None


def corpus(count: int, key: str, port: int) -> Iterator[Hostile]:
    """Always the same requests."""
    rng = random.Random(0)
    for number in range(count):
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        match number % 10:
            case 0 | 1 | 2 | 3 | 4:
                path = rng.choice([*POSTS, "/v1/items/new"])
                kind, body = body_of(rng, path)
                method = "PUT" if path.startswith("/v1/items") else "POST"
                yield Hostile(kind=kind, method=method, path=path, headers=headers, body=body)
            case 5:
                yield Hostile(kind="odd queries", path="/v1/search?" + odd_query(rng), headers=headers)
            case 6:
                yield Hostile(kind="odd paths", method=rng.choice(["GET", "DELETE", "PUT"]), path=odd_path(rng),
                              headers=headers, body=b"{}")  # fmt: skip
            case 7:
                method = rng.choice(["PATCH", "OPTIONS", "HEAD", "TRACE", "DELETE", "PUT", "POST", "BREW", "GET"])
                yield Hostile(kind="bad methods", method=method, path=rng.choice([*POSTS, *GETS]), headers=headers)
            case 8:
                yield Hostile(kind="header junk", method="POST", path="/v1/recommend",
                              headers=headers | odd_headers(rng), body=b'{"user_id":"ann"}')  # fmt: skip
            case _:
                yield Hostile(kind="no HTTP", raw=not_http(rng, key, port))


def odd_query(rng: random.Random) -> str:
    """Queries of search."""
    text = rng.choice(["", "q", "q=", "q=%00", "q=%ff%fe", "q=%", "q=a&q=b", "q=" + "x" * 5_000, "q=title:(a OR *)~",
                       "q=%22%22%22", "q=" + "a+" * 120, "q=a&k=0", "q=a&k=NaN", "q=a&k=1e9", "q=a&offset=-1",
                       "q=a&user_id=", "q=a&user_id=%00", "q=a&category=" + "y" * 300, "q=*&unknown=1", "q=a&k=9" + "9" * 5_000,  # noqa: E501
                       "q=%F0%9F%A6%80&user_id=ann", "q=item&user_id=ann&k=200&offset=1000", "&&&==", "q[]=a"])  # fmt: skip  # noqa: E501
    return text + rng.choice(["", "&" + "z=1&" * 200, "&k=5"])


def odd_path(rng: random.Random) -> str:
    """Paths below and beside the API's."""
    item = rng.choice(["%00", "%2e%2e", "%2F%2F", "a" * 3_000, "%ff", "..%2f..%2fetc%2fpasswd", "%F0%9F%A6%80", "i1%0d%0aX:1",  # noqa: E501
                       "new/similar", "similar", "i1;x=1", "{item_id}", "%25", "i1/similar/similar"])  # fmt: skip
    return rng.choice(
        [f"/v1/items/{item}", f"/v1/items/{item}/similar", f"/{item}", f"/v1/{item}", "/v1//recommend", "//"]
    )


def odd_headers(rng: random.Random) -> dict[str, str]:
    """Headers that fit HTTP's grammar and nothing else."""
    return rng.choice(
        [
            {
                "content-type": rng.choice(
                    ["text/plain", "application/xml", "multipart/form-data", "application/json; charset=utf-7", ";"]
                )
            },
            {
                "authorization": rng.choice(
                    ["", "Bearer", "Bearer  ", "Basic AAAA", "Bearer " + "x" * 4_000, "Bearer a b c"]
                )
            },
            {"accept-encoding": rng.choice(["gzip;q=x", ",,,", "*;q=0", "gzip, gzip"])},
            {"if-none-match": rng.choice(["*", '"', "W/", ",,,", "x" * 3_000])},
            {"x-request-id": rng.choice(["", "x" * 3_000, "a b\tc"])},
            {"x-forwarded-for": "127.0.0.1, ::1", "x-forwarded-prefix": "/v1/../.."},
            {"content-encoding": "gzip"},
            {"expect": "100-continue"},
            {"accept": "image/png;q=9"},
            {f"x-{number}": "y" * 50 for number in range(40)},
        ]
    )


def not_http(rng: random.Random, key: str, port: int) -> bytes:
    """Bytes for a socket: broken request lines, lengths that lie, half requests."""
    head = f"Host: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n".encode()
    body = b'{"user_id":"ann"}'
    return rng.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n" + head + b"\r\n",
            b"POST /v1/recommend HTTP/1.1\r\n" + head + b"Content-Length: -5\r\n\r\n" + body,
            b"POST /v1/recommend HTTP/1.1\r\n" + head + b"Content-Length: 999999\r\n\r\n" + body,
            b"POST /v1/recommend HTTP/1.1\r\n" + head + b"Content-Length: 17\r\nContent-Length: 5\r\n\r\n" + body,
            b"POST /v1/recommend HTTP/1.1\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n" + body,
            b"POST /v1/recommend HTTP/1.1\r\n"
            + head
            + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
            b"GET /v1/items/\xff\xfe HTTP/1.1\r\n" + head + b"\r\n",
            b"GET /healthz HTTP/1.1\r\nX: \x00\x01\r\n" + head + b"\r\n",
            b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 500 + head + b"\r\n",
            rng.randbytes(300),
        ]
    )


async def send_all(requests: Iterator[Hostile], port: int, tally: Tally) -> int:
    """Sends the corpus, some at a time; how many were sent."""
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, trust_env=False, limits=limits
    ) as client:
        sent = 0

        async def work() -> None:
            nonlocal sent
            for request in requests:
                sent += 1
                await _send(client, request, port, tally)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return sent


async def _send(client: httpx.AsyncClient, request: Hostile, port: int, tally: Tally) -> None:
    started_s = time.monotonic()
    try:
        if request.raw is not None:
            await _send_raw(request.raw, port, tally)
        else:
            answer = await client.request(
                request.method, request.path, headers=request.headers, content=request.body or None
            )
            tally.answer(request.kind, answer.status_code, answer.content, f"{request.method} {request.path}")
    except (httpx.TimeoutException, TimeoutError):
        tally.hangs += 1
        tally.count(request.kind, "hang")
    except (httpx.InvalidURL, UnicodeEncodeError, httpx.LocalProtocolError):
        tally.count(request.kind, "refused by the client")
    except httpx.TransportError as error:
        tally.count(request.kind, type(error).__name__)
    tally.slowest_s = max(tally.slowest_s, time.monotonic() - started_s)


async def _send_raw(raw: bytes, port: int, tally: Tally) -> None:
    """Sends bytes and shuts the sending half, so that a server that waits for more sees there is none."""
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(raw)
            writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            answer = await reader.read(65_536)
        except ConnectionError:
            answer = b""
        finally:
            writer.close()
    status = answer.split(b" ", 2)[1] if answer.startswith(b"HTTP/") else b""
    if status.isdigit():
        tally.answer("no HTTP", int(status), answer, repr(raw[:60]))
    else:
        tally.count("no HTTP", "closed")


def schema_cases(url: str, key: str, examples: int, tally: Tally) -> int:
    """Requests that schemathesis makes; only what the issue asks for is judged here, the rest in the tests."""
    headers = {"authorization": f"Bearer {key}"}
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    sent = 0

    def send(case: Any) -> None:
        nonlocal sent
        started_s = time.monotonic()
        answer = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S)
        sent += 1
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - started_s)
        what = f"{case.method} {case.formatted_path} {case.body!r}"
        tally.answer("schemathesis", answer.status_code, answer.content, what)

    for found in document.get_all_operations():
        operation: Any = found
        for mode in GenerationMode:
            run = settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )(given(case=operation.ok().as_strategy(generation_mode=mode))(send))
            try:
                run()
            except Exception as error:
                if type(error).__name__ != "Unsatisfiable":  # nothing can be wrong with a request of this operation
                    raise
    return sent


def bundle(folder: Path) -> Path:
    """A small model."""
    index = np.arange(1, N_ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [f"Item {number}" for number in index],
            "categories": [["drama"]] * N_ITEMS,
            "count": index[::-1],
        }
    )
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=10)), N_ITEMS)
    write_bundle(folder / "bundle", network, items, name="fuzz", version="1")
    return folder / "bundle"


def main() -> None:
    chosen = options(__doc__ or "")
    warnings.simplefilter("ignore")
    tally = Tally()
    requests = QUICK_REQUESTS if chosen.quick else REQUESTS
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        key = create_key(folder / "keys.json", "fuzz", ("read", "events", "admin"))
        arguments = {
            "bundle": str(bundle(folder)),
            "events": str(folder / "events.sqlite"),
            "keys": str(folder / "keys.json"),
        }
        with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=0, haproxy=True)) as cluster:
            url = deploy(cluster, arguments, timeout_s=300)
            port = int(url.rsplit(":", 1)[1])
            made = schema_cases(url, key, QUICK_EXAMPLES if chosen.quick else EXAMPLES, tally)
            sent = asyncio.run(send_all(corpus(requests, key, port), port, tally))
            ready = is_ready(url)
    rows = [{"kind": kind, "requests": counts.total(), "answers": ", ".join(f"{status}: {number}" for status, number in sorted(counts.items()))}  # noqa: E501
            for kind, counts in sorted(tally.statuses.items())]  # fmt: skip
    publish("fuzz", rows, list(checks(tally, sent, made, ready)), chosen.json)
    for line in tally.server_errors[:20]:
        print(line)


def checks(tally: Tally, sent: int, made: int, ready: bool) -> Iterator[Check]:
    """The targets of the issue."""
    yield Check(name="hostile requests of the corpus", value=sent, target=10_000, unit="requests", holds=sent >= 10_000)
    yield Check(name="requests of schemathesis", value=made, target=500, unit="requests", holds=made >= 500)
    errors = len(tally.server_errors)
    yield Check(name="answers of 5xx", value=errors, target=0, unit="answers", holds=errors == 0)
    yield Check(name="stack traces in answers", value=tally.traces, target=0, unit="answers", holds=tally.traces == 0)
    yield Check(name=f"hangs ({TIMEOUT_S:g} s)", value=tally.hangs, target=0, unit="requests", holds=tally.hangs == 0)
    yield Check(
        name="slowest answer", value=tally.slowest_s, target=TIMEOUT_S, unit="s", holds=tally.slowest_s < TIMEOUT_S
    )
    yield Check(name="ready at the end", value=float(ready), target=1, unit="yes", holds=ready)


if __name__ == "__main__":
    main()
