"""One value that says everything about a training run."""

from dataclasses import dataclass, field
from pathlib import Path

from elasticrec.data.plan import PlanConfig
from elasticrec.data.split import LeaveOneOut, Split
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.loss import FullSoftmax
from elasticrec.model.network import NetworkConfig
from elasticrec.model.sampled import AnyLoss, SampledSoftmax
from elasticrec.training.compute import ComputeConfig, check_compute, check_gpu, check_kernels, check_loss
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.sync.all_reduce import AllReduce
from elasticrec.training.sync.async_average import AsyncAverage
from elasticrec.training.sync.gossip import Gossip
from elasticrec.training.sync.local_sgd import LocalSGD
from elasticrec.training.sync.sharded import Sharded

LOCK_FILE = ".lock"  # in a run's folder, held by the driver that watches it
AnySync = AllReduce | Sharded | LocalSGD | Gossip | AsyncAverage


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticConfig:
    """Which workers a run takes. None of it changes the batches."""

    min_workers: int = 1
    max_workers: int = 2
    threads_per_worker: int = 1
    gpus_per_worker: float = 0.0
    max_failures: int = 10
    resize_check_s: float = 30.0
    alone_s: float = 120.0  # that a run goes on after its driver died, for the same command to find it
    exact: bool = False  # the same bits whatever the workers; one forward pass a shard
    balance: bool = True  # faster workers take more shards

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ConfigError(
                f"elastic needs 1 <= min_workers <= max_workers, got {self.min_workers} and {self.max_workers}"
            )
        if self.threads_per_worker < 1 or self.gpus_per_worker < 0 or self.resize_check_s <= 0:
            raise ConfigError("threads_per_worker must be >= 1, gpus_per_worker >= 0 and resize_check_s above 0")
        if not self.alone_s >= 5:
            raise ConfigError(f"alone_s {self.alone_s:g} must be at least 5: a driver that watches says so each second")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """After a kill at most `interval_s` seconds of work are done again."""

    interval_s: float = 20.0
    keep: int = 2
    background: bool = True  # training goes on while a checkpoint is written

    def __post_init__(self) -> None:
        if self.interval_s < 0 or self.keep < 2:
            raise ConfigError("checkpoint.interval_s must be >= 0 and keep >= 2: a torn one needs a predecessor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """The best epoch is the one with the highest `metric` on the validation cases."""

    every_epochs: int = 5
    metric: str = "ndcg@10"
    patience: int = 10  # validations without a new best before the run stops

    def __post_init__(self) -> None:
        if self.every_epochs < 1 or self.patience < 1:
            raise ConfigError("validation.every_epochs and patience must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A training run. The same name under the same storage goes on where it stopped."""

    name: str = "run"
    data: Path = Path("data")
    storage: Path = Path("runs")
    epochs: int = 100
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: AnyLoss = field(default_factory=FullSoftmax)
    split: Split = field(default_factory=LeaveOneOut)
    plan: PlanConfig = field(default_factory=PlanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sync: AnySync = field(default_factory=AllReduce)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        check_compute(self.compute, self.network)
        if self.name in ("", ".", "..") or "/" in self.name:
            raise ConfigError(f"run name {self.name!r} must be a single folder name")
        if self.epochs < 1:
            raise ConfigError(f"epochs {self.epochs} must be at least 1")
        if self.plan.shards < self.elastic.max_workers:
            raise ConfigError(
                f"{self.plan.shards} shards cannot feed {self.elastic.max_workers} workers; "
                "raise plan.shards or lower elastic.max_workers"
            )
        if isinstance(self.loss, SampledSoftmax) and not isinstance(self.sync, AllReduce | Sharded):
            raise ConfigError(
                f"loss '{self.loss.kind}' trains only the rows that a step touches, which sync '{self.sync.kind}' "
                "cannot agree on; use sync.kind all_reduce or sharded, or loss.kind full_softmax"
            )
        if self.elastic.exact and (not isinstance(self.sync, AllReduce) or self.sync.hook is not None):
            raise ConfigError(
                "elastic.exact adds up gradients in its own way, and this sync in another; "
                "use sync.kind all_reduce without a hook, or leave elastic.exact out"
            )
        if self.compute.capture and (self.elastic.max_workers > 1 or self.elastic.exact or not self._captures):
            raise ConfigError(
                "compute.capture is for one worker, sync.kind all_reduce, loss.kind full_softmax and no elastic.exact; "
                "leave it out or set elastic.max_workers to 1"
            )
        self._check_worker()
        if isinstance(self.sync, Sharded):
            self.sync.check_workers(self.elastic.max_workers)
        if self.network.table != "float32":
            raise ConfigError(f"table '{self.network.table}' cannot be trained; train float32 and compress afterwards")
        if not self.network.trainable:
            raise ConfigError(
                f"table_rank {self.network.table_rank} with linear '{self.network.linear}' cannot be trained; "
                "leave them out and compress afterwards"
            )
        known = {f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in self.evaluation.ks}
        if self.validation.metric not in known:
            raise ConfigError(f"validation.metric '{self.validation.metric}' is not measured; known: {sorted(known)}")

    def _check_worker(self) -> None:
        """Raises what a worker would raise, before one is started."""
        gpus = self.elastic.gpus_per_worker
        check_loss(self.compute, self.loss)
        check_gpu(self.compute, gpus > 0, f"elastic.gpus_per_worker is {gpus:g}")
        if gpus > 0:
            check_kernels(self.network)

    @property
    def _captures(self) -> bool:
        return isinstance(self.sync, AllReduce) and isinstance(self.loss, FullSoftmax)

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        return self.storage / self.name
