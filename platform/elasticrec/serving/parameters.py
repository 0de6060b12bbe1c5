"""A query string in; refused where it names a value twice that can be there once."""

from typing import Final

from starlette.datastructures import QueryParams

from elasticrec.serving.api.problems import RepeatedParameterError

_ONCE: Final = ("q", "user_id", "k", "offset", "limit")


def require_once(query: bytes) -> None:
    """FastAPI alone would take the last of them, whoever wrote the others.

    Raises:
        RepeatedParameterError: naming it.
    """
    given = QueryParams(query)
    for name in _ONCE:
        if len(given.getlist(name)) > 1:
            raise RepeatedParameterError(f"the query has {name} more than once; give one")
