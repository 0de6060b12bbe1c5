"""A real Redis server on a unix socket, as durable as the service asks for; ended by its id."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis


class RedisServer:
    """Its data stay in its folder, so that it can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.url = f"unix://{folder}/redis.sock?db=0"
        self.start()

    def start(self) -> None:
        settings = ["--port", "0", "--unixsocket", f"{self._folder}/redis.sock", "--dir", str(self._folder)]
        settings += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", *self._options]
        self._process = subprocess.Popen(["redis-server", *settings], stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 20
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    assert time.monotonic() < deadline_s
                    time.sleep(0.02)

    def fresh(self) -> str:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()
        return self.url

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=20)


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    folder = Path(tempfile.mkdtemp(prefix="er-redis-", dir="/tmp"))  # a socket's path ends at 107 bytes
    server = RedisServer(folder, *options)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
