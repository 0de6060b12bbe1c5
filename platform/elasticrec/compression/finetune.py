"""A network that lost parts in, the same network trained on out; the teacher may help."""

from dataclasses import dataclass
from typing import ClassVar

from elasticrec.compression.train import Lesson, check_trainable, teach, weights_key
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.model.network import Network


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTune(Lesson):
    """Trains what the steps before it made."""

    kind: ClassVar[str] = "finetune"
    epochs: int = 10
    learning_rate: float = 5e-4
    soft_share: float = 0.5


@apply.register
def _(step: FineTune, network: Network, bench: Workbench) -> Network:
    check_trainable(network, step.kind)
    weights = network.state_dict()
    return teach(step, network.config, weights, bench, weights_key(weights))
