"""How this process keeps memory: glibc is told not to give freed blocks back to the system.

Every step frees and takes again the same hundreds of megabytes. By default glibc returns blocks from 128 KB on, and
each page is then mapped and zeroed anew. Threads other than the first have heaps of at most 64 MB, of which it returns
each that is empty, unless it is to have that much room to spare.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_HEAP = 64 * 2**20  # HEAP_MAX_SIZE of malloc/arena.c, in address space: pages count when they are touched
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Call it before tensors are made. Returns whether the C library took it; others than glibc do as they do."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _HEAP}
    taken = [mallopt(name, value) for name, value in settings.items()]
    return all(taken)
