"""The load generator of the serving benchmarks: counts what came, repeats once what a broken connection took."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def load(port: int, **others: Any) -> dict[str, Any]:
    plan = {"port": port, "connections": 2, "seconds": 0.5, "bodies": ['{"k": 1}']} | others
    done = subprocess.run([sys.executable, "-m", "benchmarks.loadgen"], input=json.dumps(plan), text=True, cwd=ROOT,
                          capture_output=True, timeout=60, check=True)  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def server(
    statuses: list[int | None], *, hang_up: bool = False, came: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Answers each request by the next status, the last one for ever; none ends the connection instead, `hang_up` each
    connection after its answer. `came` is called at each request, one at a time."""
    listener = socket.create_server(("127.0.0.1", 0))
    lock = threading.Lock()

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65_536):
                with lock:
                    came()
                    status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
                if status is None:
                    return
                connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
                if hang_up:
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_it_counts_answers_and_times_them() -> None:
    with server([200, 429, 500, 200]) as port:
        found = load(port)
    assert found["statuses"]["429"] == found["statuses"]["500"] == 1
    assert found["failed"] == 1  # too many requests is an answer
    assert found["failures"] == ["500 {}"]
    assert found["requests"] == sum(found["statuses"].values()) > 2
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]


def test_a_broken_connection_is_tried_once_more() -> None:
    with server([200, None, 200]) as port:
        found = load(port)
    assert (found["retried"], found["failed"]) == (1, 0)
    with server([None]) as port:
        found = load(port, connections=1, seconds=0.2)
    assert found["failed"] > 0
    assert found["failures"][0].startswith("the connection ended twice")


def test_a_pace_is_kept_and_events_are_told() -> None:
    with server([200]) as port:
        found = load(port, connections=1, pace_s=0.02, writes=True, seconds=1)
    assert 20 <= found["requests"] <= 51
    assert found["acknowledged"][:2] == [["load-0", "e0"], ["load-0", "e1"]]
    assert abs(len(found["acknowledged"]) - found["requests"] / 10) <= 1


def test_a_connection_that_ends_while_it_rests_doubles_nothing() -> None:
    """The next request waits for its turn all the same, and events keep their answers."""
    with server([200], hang_up=True) as port:
        found = load(port, connections=1, seconds=1.0, pace_s=0.05, writes=True)
    assert 10 <= found["requests"] <= 21
    assert len(found["acknowledged"]) == found["requests"] // 10


def test_a_paced_load_is_even_again_after_a_stall() -> None:
    """Ten callers that each send every 0.2 s: one each 20 ms, before and after a stall of half a second."""
    times_s: list[float] = []

    def came() -> None:
        times_s.append(time.monotonic())
        if len(times_s) == 30:
            time.sleep(0.5)

    with server([200], came=came) as port:
        found = load(port, connections=10, seconds=2.5, pace_s=0.2)
    assert found["sent"] == len(times_s)
    assert 10 <= found["left_out"] <= 35  # two or three of each caller, as the answers come when the stall is over
    assert 120 <= found["sent"] + found["left_out"] <= 126
    stalled_s = times_s[29]
    for begin_s, end_s in ((times_s[0], stalled_s), (stalled_s + 0.8, times_s[0] + 2.4)):
        of_each = [time_s for time_s in times_s if begin_s <= time_s <= end_s]
        assert len(of_each) > 20
        # Callers in step with each other would send ten at once and then none for 200 ms.
        assert max(later - earlier for earlier, later in pairwise(of_each)) < 0.15
