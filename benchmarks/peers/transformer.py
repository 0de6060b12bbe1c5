"""One task in, the ranks of a RecTools model out: `python -m benchmarks.peers.transformer FOLDER`.

It runs in the peers' environment. RecTools gets all training events and keeps, by design, the newest max_length + 1
of each user. HSTU gets times, and the time of the request, where the data has them.

# B cases of a batch, T positions, I items + 1 of the store, J items of the peer
"""

import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything  # type: ignore[import-not-found,unused-ignore]
from pytorch_lightning.callbacks import LambdaCallback  # type: ignore[import-not-found,unused-ignore]
from rectools import Columns  # type: ignore[import-not-found,unused-ignore]
from rectools.dataset import Dataset  # type: ignore[import-not-found,unused-ignore]
from rectools.models import HSTUModel, SASRecModel  # type: ignore[import-not-found,unused-ignore]
from rectools.models.nn.item_net import IdEmbeddingsItemNet  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from benchmarks.quality.task import Problem, Task, Watch, problem_of, read_task
from elasticrec.data.sequences import Int64
from elasticrec.model.history import History


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    task = read_task(folder / "task.json")
    torch.set_num_threads(task.threads)
    seed_everything(task.seed, verbose=False)
    problem = problem_of(task)
    watch = Watch(task, problem)
    model = make_model(task, has_times=problem.store.sequences.time_E is not None)
    model._trainer = make_trainer(task, watch)
    model.fit(Dataset.construct(events(problem)))
    module = model.lightning_model
    module.torch_model.load_state_dict(watch.best)
    module.torch_model.to(task.device).eval()
    watch.finish(folder, PeerScorer(module, problem.store.n_items), facts(task.config))


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """What the result says of the peer."""
    names = ("RecTools", "pytorch-lightning", "torch", "numpy", "pandas")
    return {"config": config, "versions": {name: version(name) for name in names}}


def make_model(task: Task, has_times: bool) -> Any:
    """An untrained SASRec or HSTU."""
    shared: dict[str, Any] = {
        "session_max_len": task.max_length,
        "item_net_block_types": (IdEmbeddingsItemNet,),
        "epochs": task.epochs,
    }
    if task.model == "rectools-hstu":
        return HSTUModel(relative_time_attention=has_times, **shared, **task.config)
    return SASRecModel(**shared, **task.config)


def make_trainer(task: Task, watch: Watch) -> Trainer:
    """Lightning's trainer with a validation on the whole catalogue after epochs."""

    def end_epoch(trainer: Trainer, module: Any) -> None:
        epoch = trainer.current_epoch + 1
        if not watch.is_due(epoch):
            return
        module.eval()
        model_state: Callable[[], Any] = lambda: deepcopy(module.torch_model.state_dict())  # noqa: E731
        trainer.should_stop = watch.after(epoch, PeerScorer(module, watch.problem.store.n_items), model_state)
        module.train()

    return Trainer(
        accelerator="gpu" if task.device == "cuda" else "cpu",
        devices=1,
        min_epochs=1,
        max_epochs=task.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_epoch_end=end_epoch)],
    )


def events(problem: Problem) -> pd.DataFrame:
    """Training events as RecTools takes them, in the store's order, which its stable sort by time keeps."""
    start_U, end_U = problem.cut.train_start_U, problem.cut.train_end_U
    user_S = np.repeat(np.arange(len(start_U)), end_U - start_U)
    position_S = np.concatenate([np.arange(start, end) for start, end in zip(start_U, end_U, strict=True)])
    time_E = problem.store.sequences.time_E
    time_S = position_S if time_E is None else time_E[position_S]
    return pd.DataFrame(
        {
            Columns.User: user_S,
            Columns.Item: problem.store.sequences.item_E[position_S].astype(np.int64),
            Columns.Weight: 1.0,
            # Nanoseconds: RecTools divides by 1e9 to get seconds, whatever the unit of the column.
            Columns.Datetime: time_S.astype("datetime64[s]").astype("datetime64[ns]"),
        }
    )


class PeerScorer:
    """Scores all items of the store; those the peer never saw come last."""

    def __init__(self, module: Any, n_items: int) -> None:
        self.network, self.reads_times = module.torch_model, bool(module.data_preparator.add_unix_ts)
        self.peer_I, self.known_I = peer_items(module, n_items)

    @torch.inference_mode()
    def scores(self, history: History) -> Tensor:
        """Right-aligned histories -> float (B, I)."""
        device = self.network.item_model.device
        batch = {name: part.to(device) for name, part in inputs(history, self.peer_I, self.reads_times).items()}
        item_JD = self.network.item_model.get_all_embeddings()
        last_B1D = self.network.encode_sessions(batch, item_JD)[:, -1:, :]
        score_BJ = self.network.similarity_module(last_B1D, item_JD)[:, 0]
        score_BI: Tensor = score_BJ[:, torch.from_numpy(self.peer_I).to(device)]
        return score_BI.masked_fill(~torch.from_numpy(self.known_I).to(device), float("-inf"))


def peer_items(module: Any, n_items: int) -> tuple[Int64, Any]:
    """The peer's number of each item of the store, 0 where it has none, and whether it has one."""
    numbers = module.data_preparator.item_id_map.to_internal
    peer_I = np.array([0] + [numbers.get(item, 0) for item in range(1, n_items + 1)], dtype=np.int64)
    return peer_I, peer_I > 0


def inputs(history: History, peer_I: Int64, reads_times: bool) -> dict[str, Tensor]:
    """A batch as RecTools' own preparator makes it to recommend: the items that the peer knows, right-aligned.

    Times: those of the items, then that of the request; before the first item its time is repeated.
    """
    item_BT = peer_I[history.item_BT.numpy()]
    order_BT = np.argsort(item_BT > 0, axis=1, kind="stable")  # unknown items go to the left, among the padding
    item_BT = np.take_along_axis(item_BT, order_BT, axis=1)
    if not reads_times:
        return {"x": torch.from_numpy(item_BT)}
    assert history.time_BT is not None
    assert history.request_BT is not None
    time_BT = np.take_along_axis(history.time_BT.numpy(), order_BT, axis=1)
    time_BT1 = np.concatenate([time_BT, history.request_BT.numpy()[:, -1:]], axis=1)
    first_B = np.argmax(np.pad(item_BT, ((0, 0), (0, 1)), constant_values=1) > 0, axis=1)
    before_BT1 = np.arange(time_BT1.shape[1]) < first_B[:, None]
    first_time_B1 = np.take_along_axis(time_BT1, first_B[:, None], axis=1)
    return {"x": torch.from_numpy(item_BT), "unix_ts": torch.from_numpy(np.where(before_BT1, first_time_B1, time_BT1))}


if __name__ == "__main__":
    main()
