"""Paths with an id in them in; the id to its last character out, whatever characters it has.

Starlette's `{id:path}` stops at a line feed, and the `$` behind it matches before one: `a%0A` would be read as `a`.
"""

from typing import Final

from starlette.convertors import CONVERTOR_TYPES, PathConvertor, register_url_convertor

_NAME: Final = "path"


class WholeConvertor(PathConvertor):
    """To the end of the path; or, where more of the route follows, not in a path that ends in a line feed."""

    regex = r"(?s:.*\Z|(?!.*\n\Z).*)"


def take_whole_ids() -> None:
    """For the routes that are made from here on.

    In place of Starlette's own, since Ray Serve's proxies make the routes again of their texts and know no other name.
    """
    if not isinstance(CONVERTOR_TYPES[_NAME], WholeConvertor):
        register_url_convertor(_NAME, WholeConvertor())
