"""A network's config and a lesson in, the trained network out: in this process, by the loop that trains all else.

What it has done lies in the trial's own folder, so a trial that is started again goes on from there.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from elasticrec.compression.paired import compared_k
from elasticrec.compression.workbench import Workbench
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.distillation import Distillation, DistilledLoss
from elasticrec.model.loss import SummedLoss
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sampled import AnyLoss
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop, MakeLoss
from elasticrec.training.recipe import recommended
from elasticrec.training.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What all steps that train have in common. Batches, warm-up and averaging follow from the data's size.

    With soft_share and hidden_share 0 the teacher is not asked.
    """

    epochs: int
    learning_rate: float
    temperature: float = 1.0
    soft_share: float = 0.9
    hidden_share: float = 0.0
    mask_seen: bool | None = None  # whether a softmax leaves out what was had; none: where an evaluation removes it

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0:
            raise ConfigError(f"epochs {self.epochs} must be at least 1 and learning_rate {self.learning_rate} above 0")
        self.distillation(mask_seen=False)

    def distillation(self, *, mask_seen: bool) -> Distillation:
        return Distillation(
            temperature=self.temperature,
            soft_share=self.soft_share,
            hidden_share=self.hidden_share,
            mask_seen=mask_seen,
        )


def teach(
    lesson: Lesson, network: NetworkConfig, weights: Mapping[str, Tensor] | None, bench: Workbench, key: str
) -> Network:
    """The network of the best validation, in evaluation mode on the CPU.

    Args:
        weights: to start from; without them random ones, by the bench's seed.
        key: tells what `lesson` does not of where training starts; another key trains anew.
    """
    what = lesson.distillation(mask_seen=masks_seen(lesson.mask_seen, bench))
    folder = bench.scratch / f"training-{_digest(lesson, what, network, bench.seed, key)}"
    return fit(lesson_run(lesson, network, bench, what, folder), bench, weights, make_loss(what, bench))


def masks_seen(told: bool | None, bench: Workbench) -> bool:
    """Whether the softmax leaves out what a user had."""
    return bench.evaluation.remove_seen if told is None else told


def lesson_run(lesson: Lesson, network: NetworkConfig, bench: Workbench, what: Distillation, folder: Path) -> RunConfig:
    """The run that a data set of this size is recommended, of the lesson's length."""
    run = recommended(bench.store, lesson.epochs)
    return replace(
        run,
        name=folder.name,
        data=bench.store.path,
        storage=folder.parent,
        network=network,
        loss=what.hard,
        split=bench.split,
        plan=replace(run.plan, seed=bench.seed),
        optimizer=replace(run.optimizer, learning_rate=lesson.learning_rate),
        evaluation=bench.evaluation,
        validation=replace(run.validation, metric=watched_metric(bench.evaluation)),
    )


def watched_metric(config: EvaluationConfig) -> str:
    """By which epochs are chosen, and trials ended."""
    return f"ndcg@{compared_k(config)}"


def make_loss(what: Distillation, bench: Workbench) -> MakeLoss:
    """The plain loss of the run where no teacher is asked."""
    if not what.asks_teacher:
        return SummedLoss
    teacher = copy.deepcopy(bench.teacher).to(bench.device)

    def distilled(network: Network, _loss: AnyLoss) -> SummedLoss:
        return DistilledLoss(network, what, teacher)

    return distilled


def fit(
    run: RunConfig, bench: Workbench, weights: Mapping[str, Tensor] | None = None, loss: MakeLoss = SummedLoss
) -> Network:
    """Trains, or goes on with what the run's folder holds; each validation is told to the bench."""
    host = LocalHost(run.folder, device=bench.device)
    loop = _ToldLoop(run, bench, host, weights, loss)
    loop.train()
    network = Network(run.network, bench.store.n_items)
    network.load_state_dict({name: loop.best_weights[name] for name in network.state_dict()})
    return network.eval().requires_grad_(False)


class _ToldLoop(Loop):
    """Tells the bench of each validation."""

    def __init__(
        self, run: RunConfig, bench: Workbench, host: LocalHost, weights: Mapping[str, Tensor] | None, loss: MakeLoss
    ) -> None:
        super().__init__(run, bench.store, host, weights=weights, make_loss=loss)
        self._report = bench.report

    def validate(self) -> dict[str, float]:
        metrics = super().validate()
        self._report(metrics | {"epoch": self.step // self.plan.steps_per_epoch})
        return metrics


def check_trainable(network: Network, step: str) -> None:
    """Raises ConfigError unless all is float32, as it was trained."""
    config = network.config
    for name, precision in (("item table", config.table), ("linear layers", config.linear)):
        if precision != "float32":
            raise ConfigError(
                f"'{step}' needs a float32 network and the {name} is {precision}; "
                "put prune, distil and finetune before the steps that round or factorise"
            )


def weights_key(weights: Mapping[str, Tensor]) -> str:
    """Tells weights apart."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
