"""Numbers of a run in, a JSON-lines file and TensorBoard events out. Only the first worker writes.

`steps.jsonl` has exactly one line for each step of the plan: on a resume the lines past the checkpoint are cut off
before the steps are done again.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import IO, Any

from elasticrec.training.board import Board
from elasticrec.training.telemetry import Nobody, Observer

STEPS = "steps.jsonl"
EPOCHS = "epochs.jsonl"
STARTS = "starts.jsonl"


class Journal:
    """Appends to a run's folder."""

    def __init__(self, folder: Path, resume_step: int, observer: Observer | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._observer = observer or Nobody()
        earlier = read(folder / STEPS)
        self._observer.began(earlier)
        _note_start(folder, resume_step, earlier)
        self._steps = _open_rewound(folder / STEPS, resume_step, earlier)
        self._epochs = _open_rewound(folder / EPOCHS, resume_step, read(folder / EPOCHS))
        self._board = Board(folder / "tensorboard", resume_step)
        self._undrawn: list[Mapping[str, Any]] = []

    def step(self, line: Mapping[str, Any]) -> None:
        """One training step: step, epoch, loss, learning rate, counted samples and tokens, workers, seconds."""
        self._steps.write(json.dumps(line) + "\n")
        self._observer.step(line)
        self._undrawn.append(line)

    def epoch(self, line: Mapping[str, Any]) -> None:
        """One epoch: mean loss, and the validation metrics when it was validated."""
        self._epochs.write(json.dumps(line) + "\n")
        told = {name.replace("@", "_at_"): value for name, value in line.items() if name not in ("epoch", "step")}
        self._board.draw(int(line["step"]), {f"epoch/{name}": value for name, value in told.items()})
        self.flush()

    def flush(self) -> None:
        """Lets readers see all lines so far. Steps told since the last time are one point of a curve, their mean."""
        self._steps.flush()
        self._epochs.flush()
        if self._undrawn:
            means = {f"train/{name}": fmean(line[name] for line in self._undrawn) for name in ("loss", "learning_rate")}
            self._board.draw(self._undrawn[-1]["step"], means)
            self._undrawn = []

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self._steps.close()
        self._epochs.close()
        self._board.close()
        self._observer.ended()


def _note_start(folder: Path, resume_step: int, earlier: Sequence[Mapping[str, Any]]) -> None:
    """When and where workers went on, and how many steps they do again that were told of before."""
    again = sum(line["step"] >= resume_step for line in earlier)
    with _open_rewound(folder / STARTS, math.inf, read(folder / STARTS)) as starts:
        starts.write(json.dumps({"step": resume_step, "again": again, "time": time.time()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a journal; a line torn by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _open_rewound(path: Path, resume_step: float, lines: Sequence[Mapping[str, Any]]) -> IO[str]:
    kept = [line for line in lines if line["step"] < resume_step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.rename(path)
    return path.open("a", encoding="utf-8")
