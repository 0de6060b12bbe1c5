"""Threads of a replica share what malloc keeps free."""

import subprocess
import sys

import pytest

FILLED = """
import ctypes, sys, threading
from elasticrec.serving.memory import limit_arenas
if sys.argv[1] == "limited" and not limit_arenas():
    sys.exit("no glibc")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(12)
def fill():
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=fill) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def arenas(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FILLED, mode], capture_output=True, text=True, check=False)
    if done.stderr.startswith("no glibc"):
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    return done.stdout.count("<heap nr=")


def test_threads_share_a_few_arenas() -> None:
    assert arenas("limited") <= 2 < arenas("as it comes")
