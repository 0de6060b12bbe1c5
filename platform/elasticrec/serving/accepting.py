"""An event loop in; servers on it that accept all connections that wait, and not one a turn, out.

libuv, which uvloop stands on, accepts one connection in each turn of its loop (libuv's pull request 3696). A turn of a
busy replica takes tens of milliseconds, so the last of hundreds who connect at once would wait for seconds.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

Factory = Callable[[], asyncio.BaseProtocol]


def accept_all(loop: asyncio.AbstractEventLoop) -> None:
    """For servers that are made on the loop from now on, of a socket and without TLS."""
    make = loop.create_server

    async def create_server(factory: Factory, *args: Any, **others: Any) -> Any:
        sock = others.get("sock")
        if sock is not None and not others.get("ssl"):
            factory = Greedy(loop, factory, sock)
        return await make(factory, *args, **others)

    loop.create_server = create_server  # type: ignore[method-assign,assignment]


class Greedy:
    """Makes the protocol of a connection that the loop has accepted, and accepts all others that wait."""

    def __init__(self, loop: asyncio.AbstractEventLoop, factory: Factory, listener: socket.socket) -> None:
        self._loop, self._factory, self._listener = loop, factory, listener
        self._attaching: set[asyncio.Task[Any]] = set()

    def __call__(self) -> asyncio.BaseProtocol:
        self._loop.call_soon(self._accept_others)
        return self._factory()

    def _accept_others(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # none waits, or the listener is closed
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._attach(connection))
            self._attaching.add(task)
            task.add_done_callback(self._attaching.discard)

    async def _attach(self, connection: socket.socket) -> None:
        if self._listener.fileno() == -1:  # closed meanwhile: whoever ends the server's connections would not know it
            connection.close()
        else:
            await self._loop.connect_accepted_socket(self._factory, connection)
