"""Freed memory stays with the process."""

import subprocess
import sys

STAYS = """
import sys
from pathlib import Path
from elasticrec.training.allocator import keep_freed_memory

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
blocks = [bytes(1_000_000).replace(bytes(1), b"x") for _ in range(200)]
full = resident()
del blocks
print((resident() - before) / (full - before))
"""


def share_that_stays(way: str) -> float:
    command = [sys.executable, "-c", STAYS, way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_freed_blocks_stay_with_the_process_when_told() -> None:
    assert share_that_stays("leave") < 0.2
    assert share_that_stays("keep") > 0.8
