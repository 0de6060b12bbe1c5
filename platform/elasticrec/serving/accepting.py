"""An event loop in; servers on it that accept all connections that wait, and not one a turn, out.

libuv, which uvloop stands on, accepts one connection in each turn of its loop (libuv's pull request 3696). A turn of a
busy replica takes tens of milliseconds, so the last of hundreds who connect at once would wait for seconds.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Factory = Callable[[], asyncio.BaseProtocol]


def accept_all(loop: asyncio.AbstractEventLoop, before: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> None:
    """For servers that are made on the loop from now on, of a socket and without TLS.

    `before`: puts something in front of the app that the protocols of uvicorn call.
    """
    make = loop.create_server

    async def create_server(factory: Factory, *args: Any, **others: Any) -> Any:
        sock = others.get("sock")
        if sock is not None and not others.get("ssl"):
            factory = Greedy(loop, factory, sock, before)
        return await make(factory, *args, **others)

    loop.create_server = create_server  # type: ignore[method-assign,assignment]


class Greedy:
    """Makes the protocol of a connection that the loop has accepted, and accepts all others that wait."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: Factory,
        listener: socket.socket,
        before: Callable[[ASGIApp], ASGIApp],
    ) -> None:
        self._loop, self._factory, self._listener, self._before = loop, factory, listener, before
        self._attaching: set[asyncio.Task[Any]] = set()

    def __call__(self) -> asyncio.BaseProtocol:
        self._loop.call_soon(self._accept_others)
        return self._protocol()

    def _protocol(self) -> asyncio.BaseProtocol:
        protocol = self._factory()
        if isinstance(protocol, H11Protocol | HttpToolsProtocol):
            protocol.app = self._before(protocol.app)
        return protocol

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
            await self._loop.connect_accepted_socket(self._protocol, connection)
