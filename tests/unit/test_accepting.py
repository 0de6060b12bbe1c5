"""Many connect at once to a busy loop: how many turns of it the last one waits for."""

import asyncio
import socket
from typing import cast

import pytest
import uvloop

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
