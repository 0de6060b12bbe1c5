"""A store and a size in, the seconds of each epoch of RecTools' SASRec out, as a line of JSON.

`python -m benchmarks.peers.epochs '{"store": …}'`, in the peers' environment. Nothing but training is timed: no
validation, no logger, no checkpoint.
"""

import json
import sys
import time
import warnings
from typing import Any

import torch
from pytorch_lightning import Trainer, seed_everything  # type: ignore[import-not-found,unused-ignore]
from pytorch_lightning.callbacks import LambdaCallback  # type: ignore[import-not-found,unused-ignore]
from rectools.dataset import Dataset  # type: ignore[import-not-found,unused-ignore]
from rectools.models import SASRecModel  # type: ignore[import-not-found,unused-ignore]
from rectools.models.nn.item_net import IdEmbeddingsItemNet  # type: ignore[import-not-found,unused-ignore]

from benchmarks.peers.transformer import events
from benchmarks.quality.task import Part, Problem
from elasticrec.data.sequences import open_store
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.evaluation.ranking import EvaluationConfig


def main() -> None:
    warnings.simplefilter("ignore")
    asked: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    seed_everything(0, verbose=False)
    seconds: list[float] = []
    ends_s: list[float] = []
    model = SASRecModel(
        session_max_len=asked["max_length"],
        batch_size=asked["batch_users"],
        epochs=asked["epochs"],
        item_net_block_types=(IdEmbeddingsItemNet,),
        loss="softmax",
        **asked["size"],
    )
    model._trainer = make_trainer(asked["epochs"], seconds, ends_s)
    model.fit(Dataset.construct(events(problem(asked))))
    print(json.dumps({"seconds": seconds, "first_epoch_ended_s": ends_s[0]}))


def problem(asked: dict[str, Any]) -> Problem:
    """The training events of a leave-one-out split."""
    store = open_store(asked["store"])
    cut = split(LeaveOneOut(), store.sequences)
    return Problem(
        store=store,
        cut=cut,
        validation=Part(sequences=store.sequences, cases=cut.validation),
        tests={},
        evaluation=EvaluationConfig(),
        max_length=asked["max_length"],
    )


def make_trainer(epochs: int, seconds: list[float], ends_s: list[float]) -> Trainer:
    """Lightning's, with nothing that a bare loop has not; it appends how long each epoch took and when it ended."""
    start_s = [0.0]

    # Functions, since RecTools deep-copies its trainer along with the state of bound methods.
    def begin(*_: Any) -> None:
        start_s[0] = time.perf_counter()

    def end(*_: Any) -> None:
        seconds.append(time.perf_counter() - start_s[0])
        ends_s.append(time.time())

    return Trainer(
        accelerator="cpu",
        devices=1,
        min_epochs=epochs,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_epoch_start=begin, on_train_epoch_end=end)],
    )


if __name__ == "__main__":
    main()
