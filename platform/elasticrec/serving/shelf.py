"""URIs of bundles in, what was loaded from each out; loading happens in a thread, beside what is in use."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from elasticrec.errors import ElasticRecError

T = TypeVar("T")
_LOGGER = logging.getLogger("ray.serve")  # where an operator of the service looks


class Shelf(Generic[T]):
    """Belongs to one event loop. What cannot be loaded is refused with its reason, and changes nothing else."""

    def __init__(self, load: Callable[[str], T]) -> None:
        """`load`: raises ElasticRecError for a bundle that must not answer."""
        self._load = load
        self._loaded: dict[str, T] = {}
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self.refused: dict[str, str] = {}

    def __contains__(self, uri: str | None) -> bool:
        return uri in self._loaded

    def __getitem__(self, uri: str) -> T:
        return self._loaded[uri]

    async def add(self, uris: Sequence[str]) -> None:
        """Loads those that are not there; each that fails is in `refused` until somebody asks again."""
        self.refused = {}
        for uri in uris:
            if uri not in self._loaded:
                await self._add(uri)

    def keep(self, uris: Sequence[str]) -> None:
        """Forgets all others. Whoever answers by one of them still has it, and finishes."""
        self._loaded = {uri: loaded for uri, loaded in self._loaded.items() if uri in uris}

    async def _add(self, uri: str) -> None:
        try:
            loaded = await asyncio.get_running_loop().run_in_executor(self._loader, self._load, uri)
        except Exception as error:  # whatever it is, it must not end what answers
            expected = isinstance(error, ElasticRecError)
            self.refused[uri] = str(error) if expected else f"{type(error).__name__}: {error}"
            _LOGGER.error("bundle refused, the versions before stay: %s", self.refused[uri], exc_info=not expected)
        else:
            self._loaded = self._loaded | {uri: loaded}
