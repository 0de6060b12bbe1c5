"""Many connect at once to a busy loop: how many turns of it the last one waits for."""

import asyncio
import socket
from typing import Literal, cast

import httpx
import pytest
import uvicorn
import uvloop
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from elasticrec.serving.accepting import accept_all

CALLERS = 40


async def turns_until_all_are_in(*, greedy: bool) -> int:
    """Of a loop that always has something else to do; each caller is greeted and said goodbye to."""
    loop = asyncio.get_running_loop()
    if greedy:
        accept_all(loop)
    came, turns = [], 0

    class Greeting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            own = cast(asyncio.WriteTransport, transport)  # uvloop's are none by their class
            came.append(own)
            own.write(b"hello")
            own.close()

    with socket.create_server(("127.0.0.1", 0), backlog=CALLERS) as listener:
        server = await loop.create_server(Greeting, sock=listener)
        callers = [socket.create_connection(listener.getsockname()) for _ in range(CALLERS)]
        while len(came) < CALLERS and turns < 1_000:
            turns += 1
            await asyncio.sleep(0)
        for caller in callers:
            with caller:
                caller.settimeout(5)
                assert await loop.run_in_executor(None, caller.recv, 5) == b"hello"
        server.close()
        await server.wait_closed()
    return turns


def test_all_that_wait_are_accepted_at_once() -> None:
    assert uvloop.run(turns_until_all_are_in(greedy=True)) < CALLERS / 4


def test_libuv_accepts_one_a_turn() -> None:
    """What `accept_all` is for: where this fails, it can go."""
    assert uvloop.run(turns_until_all_are_in(greedy=False)) >= CALLERS


def test_a_server_that_has_closed_accepts_nobody() -> None:
    async def close_before_it_looks() -> None:
        loop = asyncio.get_running_loop()
        accept_all(loop)
        listener = socket.create_server(("127.0.0.1", 0))
        server = await loop.create_server(asyncio.Protocol, sock=listener)
        callers = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        server.close()
        listener.close()
        await asyncio.sleep(0.05)
        for caller in callers:
            caller.close()

    uvloop.run(close_before_it_looks())


@pytest.mark.parametrize("given", [{"host": "127.0.0.1", "port": 0}])
def test_a_server_of_an_address_is_made_as_before(given: dict[str, object]) -> None:
    async def make() -> None:
        loop = asyncio.get_running_loop()
        accept_all(loop)
        server = await loop.create_server(asyncio.Protocol, **given)  # type: ignore[call-overload]
        assert server.sockets
        server.close()
        await server.wait_closed()

    uvloop.run(make())


@pytest.mark.parametrize("protocol", ["h11", "httptools"])
def test_every_connection_of_uvicorn_goes_through_what_stands_before_its_app(
    protocol: Literal["h11", "httptools"],
) -> None:
    """Of those that libuv accepts and of those that are accepted along with them."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the app was asked")

    def before(_app: ASGIApp) -> ASGIApp:
        return Response("refused", 429)

    async def ask_all_at_once() -> set[int]:
        loop = asyncio.get_running_loop()
        accept_all(loop, before)
        config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0), backlog=CALLERS) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
                answers = await asyncio.gather(*(client.get(url) for _ in range(CALLERS)))
            server.should_exit = True
            await serving
        return {answer.status_code for answer in answers}

    assert uvloop.run(ask_all_at_once()) == {429}
