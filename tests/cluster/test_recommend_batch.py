"""A batch whose driver is killed with SIGKILL goes on, and ends with the bytes of a batch that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.batch import make
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.serving.batch import BatchRecommender
from elasticrec.serving.parts import ASKED, part_file, write_part

USERS, PART_USERS, BATCH_USERS, K = 943, 8, 5, 3  # 118 parts
FILES = [f"part-{part:06}.parquet" for part in range(118)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and a store."""
    folder = tmp_path_factory.mktemp("batch")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=0)) as running:
        yield running


def command(scene: Path) -> list[str]:
    sizes = ["--k", str(K), "--batch-users", str(BATCH_USERS), "--part-users", str(PART_USERS)]
    words = ["recommend-batch", str(scene / "bundle"), "--data", str(scene / "data"), "--out", str(scene / "top")]
    return [sys.executable, "-m", "elasticrec.cli", *words, *sizes]


def kill_midway(running: subprocess.Popen[bytes], growing: Path) -> set[str]:
    deadline_s = time.monotonic() + 60
    while len(list(growing.glob("part-*"))) < 3:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait(timeout=10)
    time.sleep(1)  # actors of a driver that is gone end soon; a part that they were at may still get its name
    return {file.name for file in growing.glob("part-*")}


def test_a_killed_batch_ends_as_an_undisturbed_one(scene: Path, cluster: LocalCluster) -> None:
    growing = scene / ".top.parts"
    with (scene / "log").open("wb") as log:
        first = subprocess.Popen(command(scene), env=cluster.env, stdout=log, stderr=log, start_new_session=True)
        there = kill_midway(first, growing)
    assert 3 <= len(there) < len(FILES)
    assert not (scene / "top").exists()
    inodes = {name: (growing / name).stat().st_ino for name in there}

    done = subprocess.run(command(scene), env=cluster.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(there)} of {len(FILES)} parts are there" in done.stderr
    assert sorted(os.listdir(scene / "top")) == [ASKED, *FILES]
    assert {
        name: (scene / "top" / name).stat().st_ino for name in there
    } == inodes  # finished parts were not made again
    assert json.loads((scene / "top" / ASKED).read_text())["users"] == USERS

    answer_without_ray(scene)
    for name in FILES:
        assert (scene / "top" / name).read_bytes() == (scene / "bare" / name).read_bytes()


def answer_without_ray(scene: Path) -> None:
    """On one thread, as an actor of one CPU has it: sums of two threads round otherwise."""
    recommender = BatchRecommender(str(scene / "bundle"), str(scene / "data"), K)
    (scene / "bare").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for part in range(len(FILES)):
        users = range(part * PART_USERS, min(USERS, (part + 1) * PART_USERS))
        write_part(part_file(scene / "bare", part), recommender.answers(users, BATCH_USERS))
    torch.set_num_threads(threads)
