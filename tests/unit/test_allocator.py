"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

STAYS = """
import sys
import threading
from pathlib import Path
from elasticrec.training.allocator import keep_freed_memory

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def work() -> None:
    before = resident()
    blocks = [bytes(1_000_000).replace(bytes(1), b"x") for _ in range(200)]
    full = resident()
    del blocks
    print((resident() - before) / (full - before))

if sys.argv[2] == "first thread":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


def share_that_stays(way: str, where: str) -> float:
    command = [sys.executable, "-c", STAYS, way, where]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.parametrize("where", ["first thread", "other thread"])  # Ray Train trains in another
def test_freed_blocks_stay_with_the_process_when_told(where: str) -> None:
    assert share_that_stays("leave", where) < 0.5
    assert share_that_stays("keep", where) > 0.8
