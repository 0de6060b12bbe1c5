"""A way to load a version in; a replica that speaks HTTP and moves from version to version out."""

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from elasticrec.serving.accepting import accept_all
from elasticrec.serving.arguments import Args
from elasticrec.serving.auth import KeyRing
from elasticrec.serving.door import Door
from elasticrec.serving.events import EventStore
from elasticrec.serving.following import follow, in_turn
from elasticrec.serving.gateway import Service, create_app
from elasticrec.serving.items import ItemStore
from elasticrec.serving.opening import lock_of_host, moves_of, protection_of, short_turns, watch_of
from elasticrec.serving.rollout import Rollout
from elasticrec.serving.search import SearchConfig
from elasticrec.serving.versions import Loaded, Versions


class HttpReplica:
    """What Ray Serve calls of every replica that speaks HTTP."""

    def _serve(
        self,
        args: Args,
        load: Callable[[str], Loaded],
        keys: KeyRing | None,
        events: EventStore,
        items: ItemStore,
        **of_service: Any,
    ) -> None:
        """`load`: opens a bundle, in a thread. `of_service`: fields of Service that the topology decides."""
        short_turns()
        door = Door()
        accept_all(asyncio.get_running_loop(), door.before)  # Ray makes the server on it, later
        watch = watch_of(args.how)
        self._versions = Versions(in_turn(load, lambda: self._versions.answers, lock_of_host()), watch)
        service = Service(
            model=self._versions,
            recommend=self._versions.recommend,
            events=events,
            items=items,
            search=SearchConfig(taste=args.search_taste),
            max_batch=args.max_batch,
            bulk_users=args.bulk_users,
            group=self._versions.group,
            max_waiting=args.max_ongoing_requests,
            refused=lambda: self._versions.refused,
            state=self._versions.state,
            roles=self._versions.roles,
            moves=moves_of(args),
            watch=watch,
            **of_service,
        )
        self._app = create_app(service, keys, protection_of(args), door)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        await follow(self._versions.apply(Rollout.of(user_config)), answers=self._versions.answers)

    async def rollout_state(self) -> dict[str, Any]:
        return self._versions.state()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app
