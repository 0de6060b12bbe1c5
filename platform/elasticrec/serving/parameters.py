"""A request in; refused where its query names a value twice that can be there once."""

from typing import Final

from starlette.requests import Request as HttpRequest

from elasticrec.serving.api import RepeatedParameterError

_ONCE: Final = ("q", "user_id", "k", "offset", "limit")


async def each_once(request: HttpRequest) -> None:
    """A dependency of routes. FastAPI alone would take the last of them, whoever wrote the others.

    Raises:
        RepeatedParameterError: naming it.
    """
    for name in _ONCE:
        if len(request.query_params.getlist(name)) > 1:
            raise RepeatedParameterError(f"the query has {name} more than once; give one")
