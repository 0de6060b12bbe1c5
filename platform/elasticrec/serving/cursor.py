"""A place in a list of answers in, an opaque token out, and back; a token belongs to one question and to one order of
answers, which a model or popularity made.

`api.CURSOR` is what a token looks like.
"""

import base64
import hashlib
from typing import Final

from elasticrec.serving.api.limits import MAX_OFFSET
from elasticrec.serving.api.problems import ApiError

_DIGEST_BYTES: Final = 8


class CursorError(ApiError):
    """Not a cursor of this question."""

    status = 409
    kind = "other-cursor"
    title = "The cursor is of another question"


def encode_cursor(offset: int, question: str) -> str:
    """`question`: all that decides the order of the answers."""
    raw = offset.to_bytes(4, "big") + _digest(question)
    return base64.urlsafe_b64encode(raw).decode()  # 12 bytes, so without padding


def offset_of(cursor: str) -> int:
    """The place in the list; whether it is one of this list, `check_cursor` says.

    Raises:
        CursorError: it lies where no cursor of ours does, so it was not made here.
    """
    offset = int.from_bytes(base64.urlsafe_b64decode(cursor)[:4], "big")
    if offset > MAX_OFFSET:
        raise CursorError(f"this cursor lies beyond {MAX_OFFSET} items, where none does; ask without one to start over")
    return offset


def check_cursor(cursor: str, question: str) -> None:
    """Raises CursorError when it was made for another question, by another model, or where another source answered."""
    if base64.urlsafe_b64decode(cursor)[4:] != _digest(question):
        raise CursorError(
            "this cursor is of another question or another model version, or one of the two pages came from the model "
            "and the other from popularity; ask without one to start over"
        )


def _digest(question: str) -> bytes:
    return hashlib.blake2b(question.encode(), digest_size=_DIGEST_BYTES).digest()
