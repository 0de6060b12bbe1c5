"""How long a caller waits, from its header; and whether there is time left, wherever the work has got to.

The deadline belongs to the work, not to a function: it follows tasks as a context variable does, and crosses to another
replica as the seconds that are left, since clocks of machines differ.
"""

import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Final

from elasticrec.serving.api.problems import BadHeaderError, DeadlineError

HEADER: Final = b"x-request-timeout-ms"
MAX_TIMEOUT_MS: Final = 60_000
DEADLINE_S: ContextVar[float | None] = ContextVar("deadline_s", default=None)  # of time.monotonic()


def deadline_in(headers: Mapping[bytes, bytes], default_ms: float, now_s: float) -> float:
    """When the caller's patience ends; raises BadHeaderError unless the header is 1 to MAX_TIMEOUT_MS."""
    given = headers.get(HEADER)
    if given is None:
        return now_s + default_ms / 1e3
    if not given.isdigit() or len(given) > 6 or not 1 <= int(given) <= MAX_TIMEOUT_MS:
        raise BadHeaderError(f"X-Request-Timeout-Ms must be a whole number from 1 to {MAX_TIMEOUT_MS}")
    return now_s + int(given) / 1e3


def left_s() -> float | None:
    """Seconds until the deadline of this work; none without one."""
    deadline_s = DEADLINE_S.get()
    return None if deadline_s is None else deadline_s - time.monotonic()


def require_time() -> None:
    """Raises DeadlineError when nobody waits for this work any more."""
    if (left := left_s()) is not None and left <= 0:
        raise DeadlineError("the time that the request allowed is over; nothing was done")


def latest(deadlines: Iterable[float | None]) -> float | None:
    """When work for several callers may be dropped: with the last of them; never when one has no deadline."""
    found = list(deadlines)
    return max((deadline for deadline in found if deadline is not None), default=None) if None not in found else None
