"""How a replica's memory is handed out."""

import ctypes
from typing import Final

ARENAS: Final = 2
_ARENA_MAX: Final = -8  # M_ARENA_MAX of glibc's malloc.h


def limit_arenas(most: int = ARENAS) -> bool:
    """Lets glibc keep free memory in a few places for all threads, in place of up to 8 a CPU; whether it does now.

    A replica has some 40 threads. Their arenas fill up one after the other, long after as much is in use as ever will
    be, and look like a leak (docs/log.md). Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_ARENA_MAX, most) == 1
