"""Numbers by step in, TensorBoard events out, written by a thread: a scalar takes as long as launching many kernels."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue

log = logging.getLogger(__name__)

Drawing = tuple[int, Mapping[str, float]]


class Board:
    """Draws in the order it is told, and nobody waits for it but the end."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Of earlier events in the folder, those from `resume_step` on are hidden."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step or None)
        self._told: SimpleQueue[Drawing | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="tensorboard", daemon=True)
        self._thread.start()

    def draw(self, step: int, values: Mapping[str, float]) -> None:
        """A point for each name."""
        self._told.put((step, values))

    def close(self) -> None:
        """Returns when all of it is written."""
        self._told.put(None)
        self._thread.join()
        self._writer.close()

    def _write(self) -> None:
        works = True
        while (drawing := self._told.get()) is not None:
            try:
                self._draw(*drawing)
            except OSError as error:  # training goes on without its pictures
                if works:
                    log.warning("TensorBoard events cannot be written: %s", error)
                works = False

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
