"""Jobs of writing and reporting a checkpoint in, done in order by a thread beside training out.

One job at a time: a second one waits for the first, so that a single copy of the state is in memory.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """`background=False` does each job at once, in the caller's thread."""

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._last: Future[None] | None = None

    @property
    def idle(self) -> bool:
        """Nothing is being written."""
        return self._last is None or self._last.done()

    @property
    def failure(self) -> BaseException | None:
        """What ended the last job, if it has ended and an error ended it."""
        return self._last.exception() if self._last is not None and self._last.done() else None

    def submit(self, job: Callable[[], None]) -> None:
        """Waits for the job before, and raises what that one raised."""
        self.flush()
        if self._pool is None:
            job()
        else:
            self._last = self._pool.submit(job)

    def flush(self) -> None:
        """Waits until all is written, and raises what went wrong."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Waits; what went wrong was told by `flush` or is of no interest any more."""
        if self._pool is not None:
            self._pool.shutdown()
