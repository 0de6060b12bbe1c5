"""Requests as HTTP's parser gives them in; those for whom there is no room answered, all others passed on.

What stands between parser and app (Ray's bookkeeping, contexts and tasks of a request) costs more than a refusal. A
replica of which three times as much is asked as it can do would spend itself on that, and be late with what it let in.

An answer may come before the whole body has: behind HAProxy no caller notices; one who speaks to a replica itself, with
a large body and `connection: close`, may see a broken connection in its place.
"""

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

TurnAway = Callable[[Scope, Receive, Send], Awaitable[bool]]  # whether the request has its answer


class Door:
    """Of one replica, on its event loop; open to all until somebody keeps it."""

    def __init__(self) -> None:
        self.turn_away: TurnAway | None = None

    def before(self, app: ASGIApp) -> ASGIApp:
        """An app of which only those hear who are let in."""

        async def entered(scope: Scope, receive: Receive, send: Send) -> None:
            if self.turn_away is None or not await self.turn_away(scope, receive, send):
                await app(scope, receive, send)

        return entered
