"""A run in, when each of its steps ended as a line of JSON out: what one would write without this package's loop.

`python -m benchmarks.bare RUN.json`. The same network, batches, loss, optimizer, learning rate and averaged weights. No
Ray, no meeting, no counting, no journal, no checkpoint, no random numbers by step.
"""

import json
import sys
import time
from pathlib import Path

import torch

from elasticrec.config import from_mapping
from elasticrec.data.plan import Plan
from elasticrec.data.sequences import open_store
from elasticrec.data.split import split
from elasticrec.model.history import History
from elasticrec.model.loss import Batch, SummedLoss
from elasticrec.model.network import Network
from elasticrec.training.optimizer import AveragedWeights, learning_rate, make_optimizer
from elasticrec.training.run import RunConfig


def main() -> None:
    run = from_mapping(RunConfig, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(run.elastic.threads_per_worker)
    print(json.dumps(train(run)))


def train(run: RunConfig) -> list[float]:
    """Seconds since 1970 at which each step ended."""
    store, encoder = open_store(run.data), run.network.encoder
    plan = Plan(run.plan, store.sequences, split(run.split, store.sequences), encoder.max_length, encoder.inputs)
    torch.manual_seed(run.plan.seed)
    network = Network(run.network, store.n_items)
    loss, optimizer = SummedLoss(network, run.loss), make_optimizer(run.optimizer, network)
    averaged = AveragedWeights(network, run.optimizer.ema_decay)
    ended_s = []
    for step in range(run.epochs * plan.steps_per_epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.optimizer, step, run.epochs * plan.steps_per_epoch)
        windows = plan.windows(step, plan.users(step))
        batch = Batch(History.of(windows), torch.from_numpy(windows.target_BT))
        (loss(batch) / windows.tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update(network, step)
        ended_s.append(time.time())
    return ended_s


if __name__ == "__main__":
    main()
