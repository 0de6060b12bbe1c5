"""The training loop: a run, a store and a host in, checkpoints and a journal out. It knows nothing of Ray.

# B users of a piece, T positions, C validation cases
"""

import contextlib
import itertools
import math
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elasticrec.data.plan import Plan
from elasticrec.data.sequences import Int64, Store
from elasticrec.data.split import SplitData, split
from elasticrec.errors import ElasticRecError, TrainingError
from elasticrec.evaluation.ranking import rank, rank_metrics
from elasticrec.model.loss import SummedLoss
from elasticrec.model.network import Network
from elasticrec.model.sampled import AnyLoss
from elasticrec.training import checkpoint, compute
from elasticrec.training.elastic import Balance, Best, equal_split, is_checkpoint_due
from elasticrec.training.feed import Cut, Feed, Piece
from elasticrec.training.host import Host, Preempted, gather
from elasticrec.training.journal import Journal
from elasticrec.training.optimizer import AveragedWeights, learning_rate, make_optimizer
from elasticrec.training.pieces import Snapshot, is_sharded
from elasticrec.training.run import RunConfig
from elasticrec.training.saver import Saver
from elasticrec.training.step_table import new_network, step_table
from elasticrec.training.stopwatch import ForwardStopwatch, Laps, mark_of
from elasticrec.training.sync.exact import Exact
from elasticrec.training.sync.protocol import Link, Synchroniser, Tokens
from elasticrec.training.tally import Meeting, Share, sample_key

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


MakeLoss = Callable[[Network, AnyLoss], SummedLoss]


@dataclass(slots=True)
class _Untold:
    """Steps that workers have taken and not yet begun to tell each other of."""

    losses: list[Tensor] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)


class _UnderWay(NamedTuple):
    """A meeting that nobody has listened to yet, and the steps that it is about."""

    meeting: Meeting
    lines: list[dict[str, Any]]
    listen_at: int  # the step


class Loop:
    """State of one worker. Wherever workers meet and agree, each holds the same."""

    def __init__(
        self,
        run: RunConfig,
        store: Store,
        host: Host,
        *,
        weights: Mapping[str, Tensor] | None = None,
        make_loss: MakeLoss = SummedLoss,
    ) -> None:
        """Starts anew, or where the newest whole checkpoint of the host stands.

        Args:
            weights: of the network where it starts anew; without them it starts from random ones.
            make_loss: network and `run.loss` in, what is trained out.

        Raises:
            CheckpointError: there are checkpoints, and this run cannot go on from any.
        """
        self.run, self.store, self.host = run, store, host
        self.split: SplitData = split(run.split, store.sequences)
        encoder = run.network.encoder
        self.plan = Plan(run.plan, store.sequences, self.split, encoder.max_length, encoder.inputs)
        torch.manual_seed(run.plan.seed)
        self.network = new_network(run, store.n_items, weights).to(host.device)
        self.sync: Synchroniser = run.sync
        if run.elastic.exact:
            self.sync = Exact(shards=run.plan.shards, meet_every=run.sync.meet_every)
        self.sync.prepare(self.network)
        self.loss = make_loss(self.network, run.loss)
        compute.apply(run.compute, self.loss, host.device)
        self.feed = Feed(self.plan, compute.shapes(run.compute, host.device), self.total_steps)
        self._forward = ForwardStopwatch(self.loss, mark_of(host.device))
        self.averaged = AveragedWeights(self.network, run.optimizer.ema_decay)
        self._balance = Balance(equal_split(host.world, run.plan.shards))
        self.table = step_table(run, store, self.plan, self.network, self.averaged, self._rate, self._shards)
        self.optimizer = make_optimizer(run.optimizer, self.network)
        self.best_weights = _copy(self.averaged.state())
        self.best = Best()
        self.step = 0
        self.running = (0.0, 0.0)
        self.history: list[dict[str, float]] = []
        self._averaged_at = 0  # step at which all workers had the same averaged weights
        self._link_state: dict[str, Tensor] = {}
        self._sent_bytes = 0  # before this worker started
        self._untold = _Untold()
        self._under_way: _UnderWay | None = None
        self._laps: list[Laps] = []  # of steps that the split has not been measured by
        self._ahead = steps_ahead(self.sync.meet_every, host.device)
        self._snapshot, self._saver = Snapshot(), Saver(run.checkpoint.background)
        self._resume()

    @property
    def total_steps(self) -> int:
        return self.run.epochs * self.plan.steps_per_epoch

    def train(self) -> None:
        """Runs to the last epoch or until validation stops improving.

        Raises:
            TrainingError: the loss is no longer finite, or a checkpoint cannot be written.
            Preempted: a worker's node is about to leave; the last step is in a checkpoint.
        """
        last_save_s = time.monotonic()
        with self._journal() as journal, self.feed, self.sync.attach(self.loss, self.optimizer) as attached:
            link = compute.capture(self.run.compute, attached, self.loss, self.host.world)
            link.load_state(self._link_state)
            while self.step < self.total_steps and self.best.stale < self.run.validation.patience:
                self._train_step(link)
                save, leave = self._meet(journal, self._is_save_due(last_save_s), now=self._is_validation())
                if save or leave:
                    leave |= self._meet(journal, now=True)[1]
                if self._is_all_told and self.step % self.plan.steps_per_epoch == 0:
                    self._end_epoch(link, journal)
                if save or leave:
                    self._save(link, journal)
                    last_save_s = time.monotonic()
                if leave:
                    self._flush()
                    raise Preempted(f"a node is about to leave; step {self.step} is in a checkpoint")
            self._save(link, journal, finished=True)
            self._flush()

    def _is_save_due(self, last_save_s: float) -> bool:
        """The first worker's clock decides; a save that is still being written is waited for by nobody."""
        due = is_checkpoint_due(time.monotonic(), last_save_s, self.run.checkpoint.interval_s)
        return due and self.host.rank == 0 and self._saver.idle

    def _rate(self, step: int) -> float:
        return learning_rate(self.run.optimizer, step, self.total_steps)

    def _shards(self, rank: int) -> range:
        return self._balance.shards(rank)

    def _is_meeting(self) -> bool:
        return self.step % self.sync.meet_every == 0

    @property
    def _is_all_told(self) -> bool:
        return self._under_way is None and not self._untold.lines

    def _is_validation(self) -> bool:
        epoch, within = divmod(self.step, self.plan.steps_per_epoch)
        return within == 0 and (epoch % self.run.validation.every_epochs == 0 or epoch == self.run.epochs)

    def _train_step(self, link: Link) -> None:
        start_s = time.monotonic()
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.table.step(self.step):
            loss, share = self._accumulate(link)
            link.step()
        self.averaged.update(self.network, self.step)
        self._laps.append(self._forward.take())
        self._untold.losses.append(loss)
        self._untold.shares.append(share)
        self._untold.lines.append(
            {
                "step": self.step,
                "epoch": self.step // self.plan.steps_per_epoch,
                "learning_rate": rate,
                "workers": self.host.world,
                "sent_bytes": self._sent_bytes + link.sent_bytes + self.table.sent_bytes,
                "seconds": time.monotonic() - start_s,
                "time": time.time(),
            }
        )
        self.step += 1

    def _accumulate(self, link: Link) -> tuple[Tensor, Share]:
        pieces = self._pieces()
        users = np.concatenate([piece.users_B for piece in pieces] or [np.empty(0, dtype=np.int64)])
        mine = sum(piece.tokens for piece in pieces)
        tokens = Tokens(step=self.plan.tokens(self.step), worker=max(1, mine))
        # Float64 holds a sum of a step's losses exactly, or nearly so, in whatever order they come.
        loss = torch.zeros((), dtype=torch.float64, device=self.host.device)
        for place, piece in enumerate(pieces):
            self._seed(_piece_seed(self.run.plan.seed, self.step, piece.key))
            loss += link.accumulate(self.table.placed(piece.batch), tokens, last=place == len(pieces) - 1)
        share = Share(tokens=mine, samples=len(users), sample_key=sample_key(users))
        return loss, share

    def _seed(self, seed: int) -> None:
        """As `torch.manual_seed`, which asks every kind of device: half a millisecond of a GPU's host."""
        torch.default_generator.manual_seed(seed)
        if self.host.device.type == "cuda":
            index = self.host.device.index
            torch.cuda.default_generators[torch.cuda.current_device() if index is None else index].manual_seed(seed)

    def _pieces(self) -> list[Piece]:
        """What this worker runs forward, one after the other.

        Exact mode runs each shard that has users by itself, so that neither the random numbers nor the rounding of a
        forward pass depend on who runs it. Otherwise all shards of a worker are one piece.
        """
        mine = tuple(self._shards(self.host.rank))
        if self.run.elastic.exact:
            pieces = self.feed.take(self.step, [Cut(shard, (shard,)) for shard in mine])
            return [piece for piece in pieces if len(piece.users_B)]
        return self.feed.take(self.step, [Cut(self.host.rank, mine)])

    def _meet(self, journal: "Journal | _NoJournal", due: bool = False, *, now: bool) -> tuple[bool, bool]:
        """All workers tell what they did, which is checked against the plan and written down.

        Returns whether to save, and whether to leave. Whatever one worker wishes, all of them do.

        Args:
            due: whether this worker wishes to save.
            now: whether all steps so far are told and listened to, or what it is time for.
        """
        save, leave = self._listen(journal, now)
        if self._untold.lines and (now or self._is_meeting()):
            self._tell_others(due)
            later = self._listen(journal, now)
            save, leave = save or later[0], leave or later[1]
        return save, leave

    def _tell_others(self, due: bool) -> None:
        wishes = [due, self.host.leaving(), self._saver.failure is not None]
        untold, self._untold = self._untold, _Untold()
        meeting = Meeting(untold.losses, untold.shares, wishes, self._forward_s(), self.host.device)
        self._under_way = _UnderWay(meeting, untold.lines, self.step + self._ahead)

    def _forward_s(self) -> float:
        """Seconds of the forward passes of a step that have ended since this was asked last, or 0; the median."""
        ended = list(itertools.takewhile(Laps.have_ended, self._laps))
        self._laps = self._laps[len(ended) :]
        return statistics.median(laps.seconds() for laps in ended) if ended else 0.0

    def _listen(self, journal: "Journal | _NoJournal", now: bool) -> tuple[bool, bool]:
        """Whether to save and whether to leave, by a meeting that it is time to listen to."""
        if self._under_way is None or not (now or self.step >= self._under_way.listen_at):
            return False, False
        (meeting, lines, _), self._under_way = self._under_way, None
        tallies, (save, leave, failed), forward_s_W = meeting.listen()
        for tally, line in zip(tallies, lines, strict=True):
            if not math.isfinite(tally.loss):
                raise TrainingError(self._divergence(line["step"]))
            assert tally.tokens == self.plan.tokens(line["step"]), "workers did not cover a step's tokens exactly once"
            journal.step(asdict(tally) | line)
            self.running = (self.running[0] + tally.loss * tally.tokens, self.running[1] + tally.tokens)
            if (line["step"] + 1) % self.plan.steps_per_epoch == 0 and line["step"] + 1 < self.step:
                self._tell(self._epoch_line(line["step"]), journal)
        journal.flush()
        if failed:
            self._flush()
        if self.run.elastic.balance and self.host.world > 1:
            self._rebalance(forward_s_W)
        return save, leave

    def _rebalance(self, forward_s_W: list[float]) -> None:
        """Every worker comes to the same split, since each knows the times of all."""
        before, self._balance = self._balance, self._balance.after(forward_s_W)
        if self._balance.split_W != before.split_W:
            self._laps.clear()  # of steps by the split before, some of which a GPU may not have ended

    def _divergence(self, step: int) -> str:
        users = self.plan.users(step)[:10].tolist()
        last = checkpoint.newest_whole(self.host.checkpoints())
        kept = f"the last good checkpoint is '{last}'" if last else "there is no checkpoint yet"
        return (
            f"the loss is not finite at step {step} (first users of the batch: {users}); {kept}; lower "
            "optimizer.learning_rate or raise warmup_steps under another name"
        )

    def _end_epoch(self, link: Link, journal: "Journal | _NoJournal") -> None:
        line = self._epoch_line(self.step - 1)
        if self._is_validation():
            self._average_weights(link)
            self.table.flush(self.step)
            line |= self.validate()
            self.best = self.best.after(line[self.run.validation.metric], int(line["epoch"]))
            if self.best.stale == 0:
                _copy_into(self.best_weights, self.averaged.state())
        self._tell(line, journal)

    def _epoch_line(self, step: int) -> dict[str, float]:
        # The line carries the epoch's last step, so that a resume from its end keeps it.
        line = {"epoch": step // self.plan.steps_per_epoch + 1, "step": step, "loss": self.running[0] / self.running[1]}
        self.running = (0.0, 0.0)
        return line

    def _tell(self, line: dict[str, float], journal: "Journal | _NoJournal") -> None:
        self.history.append(line)
        journal.epoch(line)

    def _average_weights(self, link: Link) -> None:
        if self._averaged_at != self.step:
            link.average(list(self.averaged.state().values()))
            self._averaged_at = self.step

    def validate(self) -> dict[str, float]:
        """Metrics of the averaged weights on all validation cases, each worker ranking its part."""
        part: Int64 | ElasticRecError
        with self.averaged.worn_by(self.network) as network:
            try:
                part = self._ranks(network)
            except ElasticRecError as error:  # told by all workers together: one that left alone would hang the others
                part = error
        parts: list[Any] = gather(part)
        for part in parts:
            if isinstance(part, ElasticRecError):
                raise part
        rank_C = np.empty(len(self.split.validation), dtype=np.int64)
        for worker, ranks in enumerate(parts):
            rank_C[self._cases_of(worker)] = ranks
        return rank_metrics(rank_C, self.run.evaluation)[0]

    def _cases_of(self, worker: int) -> Int64:
        """The validation cases of a worker: every W-th batch. A batch is the same whatever the number of workers.

        Workers that rank together have the same.
        """
        case_C, groups = np.arange(len(self.split.validation)), self.host.world // self.table.rankers
        batch_C = case_C // self.run.evaluation.batch_cases
        return np.asarray(case_C[batch_C % groups == worker // self.table.rankers])

    def _ranks(self, network: Network) -> Int64:
        cases = self.split.validation.take(self._cases_of(self.host.rank))
        scorer, part = self.table.scorer(network)
        config, length = self.run.evaluation, self.plan.max_length
        return rank(scorer, self.store.sequences, cases, config, max_length=length, tops=False, part=part).rank_C

    def _save(self, link: Link, journal: "Journal | _NoJournal", finished: bool = False) -> None:
        link.agree()
        self._average_weights(link)
        journal.flush()
        position = checkpoint.Position(
            step=self.step,
            digest=self._digest(),
            best=asdict(self.best),
            running=self.running,
            history=tuple(self.history),
            sent_bytes=self._sent_bytes + link.sent_bytes + self.table.sent_bytes,
        )
        # Ray takes one report a second and blocks workers meanwhile, so epochs are told along with checkpoints.
        metrics = {**(self.history[-1] if self.history else {}), "step": self.step, "finished": finished}
        best = {} if not self.best.epoch else {f"best_{self.run.validation.metric}": self.best.value}
        self._flush()
        self._snapshot.take(self.state(link), self.host.rank)
        part = self._part()
        pieces = self._snapshot.pieces

        def write(folder: Path) -> None:
            if pieces or part.parts > 1:  # a replica has nothing to write, and says so
                checkpoint.save_part(folder, pieces, position, part)

        self._saver.submit(lambda: self.host.report(metrics | best, write))

    def _part(self) -> checkpoint.Part:
        if not self._snapshot.is_sharded:
            return checkpoint.Part()
        mark = gather(uuid.uuid4().hex)[0]
        return checkpoint.Part(rank=self.host.rank, parts=self.host.world, mark=mark)

    def _flush(self) -> None:
        """Waits for the last checkpoint; what went wrong on one worker is told by all. A collective."""
        try:
            self._saver.flush()
            problem = None
        except ElasticRecError as error:
            problem = str(error)
        problems = [told for told in gather(problem) if told]
        if problems:
            raise TrainingError(problems[0])

    def state(self, link: Link | None = None) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        return (
            checkpoint.flatten("network", self.network.state_dict())
            | checkpoint.flatten("averaged", self.averaged.state())
            | checkpoint.flatten("best", self.best_weights)
            | checkpoint.flatten("optimizer", checkpoint.optimizer_tensors(self.optimizer, self.network))
            | checkpoint.flatten("rows", self.table.state())
            | checkpoint.flatten("link", link.state() if link else {})
        )

    def _digest(self) -> str:
        return digest(self.plan, self.store)

    def _resume(self) -> None:
        folder = checkpoint.newest_valid(self.host.checkpoints(), self._digest())
        if folder is None:
            return
        self.host.goes_on_from(folder)
        position, tensors = checkpoint.read_position(folder), checkpoint.read_tensors(folder, self._sharded())
        self.network.load_state_dict(checkpoint.section(tensors, "network"))
        self.averaged.load_state(checkpoint.section(tensors, "averaged"))
        self.best_weights = checkpoint.section(tensors, "best")
        checkpoint.load_optimizer(self.optimizer, self.network, checkpoint.section(tensors, "optimizer"))
        self.table.load_state(checkpoint.section(tensors, "rows"))
        self._link_state = checkpoint.section(tensors, "link")
        self.step, self.running, self.history = position.step, position.running, list(position.history)
        self.best = Best(position.best["value"], int(position.best["epoch"]), int(position.best["stale"]))
        self._sent_bytes = position.sent_bytes

    def _sharded(self) -> "dict[str, DTensor]":
        tensors = dict(self.network.named_parameters()) | checkpoint.flatten("rows", self.table.state())
        return {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}

    def _journal(self) -> contextlib.AbstractContextManager["Journal | _NoJournal"]:
        if self.host.rank == 0:
            return Journal(self.run.folder, self.step, self.host.observer)
        return contextlib.nullcontext(_NoJournal())


def steps_ahead(meet_every: int, device: torch.device) -> int:
    """How many steps a GPU is given before its host listens to a meeting, so that it does not wait meanwhile."""
    return min(meet_every - 1, max(2, meet_every // 4), 8) if device.type == "cuda" else 0


def digest(plan: Plan, store: Store) -> str:
    """What a checkpoint must carry for a run to go on from it."""
    return f"{plan.digest()}-{store.fingerprint}"


def dataset_of(digest: str) -> str:
    """The fingerprint of the store in it."""
    return digest.partition("-")[2]


class _NoJournal:
    """What the other workers write to."""

    def step(self, line: dict[str, Any]) -> None: ...

    def epoch(self, line: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _copy_into(held: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """In place: a large table is not held once more in the meantime."""
    for name, tensor in tensors.items():
        held[name].copy_(tensor)


def _piece_seed(seed: int, step: int, key: int) -> int:
    return int(np.random.SeedSequence([seed, step, key]).generate_state(1, np.uint64)[0] >> np.uint64(1))
