"""The training loop: a run, a store and a host in, checkpoints and a journal out. It knows nothing of Ray.

# B users of this worker, T positions, C validation cases
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from elasticrec.data.plan import Plan, Windows
from elasticrec.data.sequences import Int64, Store
from elasticrec.data.split import SplitData, split
from elasticrec.errors import ElasticRecError, TrainingError
from elasticrec.evaluation.ranking import rank, rank_metrics
from elasticrec.model.network import Network
from elasticrec.training import checkpoint
from elasticrec.training.elastic import Best, is_checkpoint_due, shards_of
from elasticrec.training.journal import Journal
from elasticrec.training.optimizer import AveragedWeights, learning_rate, make_optimizer
from elasticrec.training.run import RunConfig
from elasticrec.training.sync.protocol import Link


class Host(Protocol):
    """Where the loop runs: a bare process, or a worker of Ray Train."""

    rank: int
    world: int
    device: torch.device

    def checkpoints(self) -> Iterable[Path]:
        """Folders of committed checkpoints, newest first."""
        ...

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Publishes metrics and a checkpoint, which `write` fills on the first worker. Called on every worker."""
        ...


class LocalHost:
    """One process without Ray; checkpoints lie under the run's folder."""

    rank = 0
    world = 1
    device = torch.device("cpu")

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder = folder / "checkpoints"
        self._keep = keep

    def checkpoints(self) -> Iterable[Path]:
        return sorted(self._folder.glob("[0-9]*"), reverse=True)

    def report(self, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        write(self._folder / f"{metrics['step']:012d}")
        for old in list(self.checkpoints())[self._keep :]:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What all workers together did in one step. Exact: sums of integers below 2**53, apart from the loss."""

    loss: float  # mean over tokens
    tokens: int
    samples: int
    sample_key: int  # sum of a hash of each user that was trained on: tells a repeated from a skipped sample
    save: bool


class Loop:
    """State of one worker. Every worker holds the same state after each step."""

    def __init__(self, run: RunConfig, store: Store, host: Host) -> None:
        """Starts anew, or where the newest whole checkpoint of the host stands.

        Raises:
            CheckpointError: there are checkpoints, and this run cannot go on from any.
        """
        self.run, self.store, self.host = run, store, host
        self.split: SplitData = split(run.split, store.sequences)
        self.plan = Plan(run.plan, store.sequences, self.split, run.network.encoder.max_length)
        torch.manual_seed(run.plan.seed)
        self.network = Network(run.network, store.n_items).to(host.device)
        self.optimizer = make_optimizer(run.optimizer, self.network)
        self.averaged = AveragedWeights(self.network, run.optimizer.ema_decay)
        self.best_weights = _copy(self.averaged.network)
        self.best = Best()
        self.step = 0
        self.running = (0.0, 0.0)
        self.history: list[dict[str, float]] = []
        self._resume()

    @property
    def total_steps(self) -> int:
        return self.run.epochs * self.plan.steps_per_epoch

    def train(self) -> None:
        """Runs to the last epoch or until validation stops improving.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        last_save_s = time.monotonic()
        with self._journal() as journal, self.run.sync.attach(self.network, self.optimizer) as link:
            while self.step < self.total_steps and self.best.stale < self.run.validation.patience:
                due = is_checkpoint_due(time.monotonic(), last_save_s, self.run.checkpoint.interval_s)
                tally = self._train_step(link, journal, save=due and self.host.rank == 0)
                if self.step % self.plan.steps_per_epoch == 0:
                    self._end_epoch(journal)
                if tally.save:
                    self._save(journal)
                    last_save_s = time.monotonic()
            self._save(journal, finished=True)

    def _train_step(self, link: Link, journal: "Journal | _NoJournal", save: bool) -> Tally:
        start_s = time.monotonic()
        users_B = self._users()
        windows = self.plan.windows(self.step, users_B)
        rate = learning_rate(self.run.optimizer, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_step_seed(self.run.plan.seed, self.step, self.host.rank))
        loss = link.loss(*self._tensors(windows))
        tally = self._agree(float(loss.detach()) / self.host.world, windows, users_B, save)
        (loss / tally.tokens).backward()
        link.step()
        self.averaged.update(self.network, self.step)
        journal.step(
            asdict(tally)
            | {
                "step": self.step,
                "epoch": self.step // self.plan.steps_per_epoch,
                "learning_rate": rate,
                "workers": self.host.world,
                "sent_bytes": link.sent_bytes,
                "seconds": time.monotonic() - start_s,
            }
        )
        self.running = (self.running[0] + tally.loss * tally.tokens, self.running[1] + tally.tokens)
        self.step += 1
        return tally

    def _users(self) -> Int64:
        mine = shards_of(self.host.rank, self.host.world, self.run.plan.shards)
        return np.concatenate([self.plan.shard(self.step, shard) for shard in mine])

    def _tensors(self, windows: Windows) -> tuple[Tensor, Tensor]:
        input_BT, target_BT = windows.input_BT, windows.target_BT
        if len(input_BT) == 0:  # a short last step can leave a worker without users; it still takes part
            input_BT = target_BT = np.zeros((1, self.plan.max_length), dtype=np.int32)
        device = self.host.device
        return torch.from_numpy(input_BT).to(device), torch.from_numpy(target_BT).to(device)

    def _agree(self, loss: float, windows: Windows, users_B: Int64, save: bool) -> Tally:
        """Sums what every worker really did, and checks it against the plan."""
        key = int(((users_B.astype(np.uint64) + np.uint64(1)) * np.uint64(2654435761) % np.uint64(2**32)).sum())
        sums = torch.tensor(
            [loss, windows.tokens, len(users_B), key, save], dtype=torch.float64, device=self.host.device
        )
        if self.host.world > 1:
            dist.all_reduce(sums)
        loss_sum, tokens, samples, sample_key, wants_save = sums.tolist()
        if not np.isfinite(loss_sum):
            raise TrainingError(self._divergence())
        assert int(tokens) == self.plan.tokens(self.step), "workers did not cover the step's tokens exactly once"
        return Tally(
            loss=loss_sum / tokens,
            tokens=int(tokens),
            samples=int(samples),
            sample_key=int(sample_key),
            save=wants_save > 0,
        )

    def _divergence(self) -> str:
        users = self.plan.users(self.step)[:10].tolist()
        return (
            f"the loss is not finite at step {self.step} (first users of the batch: {users}); the last checkpoint "
            f"lies in '{self.run.folder}'; lower optimizer.learning_rate or raise warmup_steps under another name"
        )

    def _end_epoch(self, journal: "Journal | _NoJournal") -> None:
        epoch = self.step // self.plan.steps_per_epoch
        # The line carries the epoch's last step, so that a resume from its end keeps it.
        line = {"epoch": epoch, "step": self.step - 1, "loss": self.running[0] / self.running[1]}
        self.running = (0.0, 0.0)
        if epoch % self.run.validation.every_epochs == 0 or epoch == self.run.epochs:
            line |= self.validate()
            self.best = self.best.after(line[self.run.validation.metric], epoch)
            if self.best.stale == 0:
                self.best_weights = _copy(self.averaged.network)
        self.history.append(line)
        journal.epoch(line)

    def validate(self) -> dict[str, float]:
        """Metrics of the averaged weights on all validation cases, each worker ranking its part."""
        cases = self.split.validation.part(self.host.rank, self.host.world)
        length = self.plan.max_length
        part: Int64 | ElasticRecError
        try:
            part = rank(
                self.averaged.network, self.store.sequences, cases, self.run.evaluation, max_length=length
            ).rank_C
        except ElasticRecError as error:  # told by all workers together: one that left alone would hang the others
            part = error
        parts: list[Any] = gather(part)
        for part in parts:
            if isinstance(part, ElasticRecError):
                raise part
        return rank_metrics(np.concatenate(parts), self.run.evaluation)[0]

    def _save(self, journal: "Journal | _NoJournal", finished: bool = False) -> None:
        journal.flush()
        position = checkpoint.Position(
            step=self.step,
            digest=self._digest(),
            best=asdict(self.best),
            running=self.running,
            history=tuple(self.history),
        )
        # Ray takes one report a second and blocks workers meanwhile, so epochs are told along with checkpoints.
        metrics = {**(self.history[-1] if self.history else {}), "step": self.step, "finished": finished}
        best = {} if not self.best.epoch else {f"best_{self.run.validation.metric}": self.best.value}
        self.host.report(metrics | best, lambda folder: checkpoint.save(folder, self._state(), position))

    def _state(self) -> dict[str, Tensor]:
        return (
            checkpoint.flatten("network", self.network.state_dict())
            | checkpoint.flatten("averaged", self.averaged.network.state_dict())
            | checkpoint.flatten("best", self.best_weights)
            | checkpoint.flatten("optimizer", checkpoint.optimizer_tensors(self.optimizer, self.network))
        )

    def _digest(self) -> str:
        return f"{self.plan.digest()}-{self.store.fingerprint}"

    def _resume(self) -> None:
        folder = checkpoint.newest_valid(self.host.checkpoints(), self._digest())
        if folder is None:
            return
        position, tensors = checkpoint.read_position(folder), checkpoint.read_tensors(folder)
        self.network.load_state_dict(checkpoint.section(tensors, "network"))
        self.averaged.network.load_state_dict(checkpoint.section(tensors, "averaged"))
        self.best_weights = checkpoint.section(tensors, "best")
        checkpoint.load_optimizer(self.optimizer, self.network, checkpoint.section(tensors, "optimizer"))
        self.step, self.running, self.history = position.step, position.running, list(position.history)
        self.best = Best(position.best["value"], int(position.best["epoch"]), int(position.best["stale"]))

    def _journal(self) -> contextlib.AbstractContextManager["Journal | _NoJournal"]:
        if self.host.rank == 0:
            return Journal(self.run.folder, self.step)
        return contextlib.nullcontext(_NoJournal())


class _NoJournal:
    """What the other workers write to."""

    def step(self, line: dict[str, Any]) -> None: ...

    def epoch(self, line: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...


def gather(value: Any) -> list[Any]:
    """The values of all workers, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _copy(network: Network) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
