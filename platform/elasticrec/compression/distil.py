"""A teacher in, a smaller network that learned from it out.

# I items + 1, T positions, D width of the student, E of the teacher
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from elasticrec.compression.train import Lesson, teach, weights_key
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.errors import ConfigError
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import Encoder, EncoderConfig
from elasticrec.model.network import Network, NetworkConfig

TABLE = "encoder.items.weight_ID"
POSITIONS = "encoder.position_TD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Distil(Lesson):
    """A student of gated blocks that reads what its teacher reads and scores by the same kind of head.

    `start` projection: item table and positions begin as the teacher's, on the `width` directions that keep most of
    the table; the blocks begin at random. Without a teacher (`soft_share` 0, start scratch) it is the same student,
    trained alone; it needs dropout then, which soft logits do without.
    """

    kind: ClassVar[str] = "distil"
    width: int = 32
    blocks: int = 1
    heads: int = 1
    expansion: float = 2.0
    dropout: float = 0.0
    start: Literal["scratch", "projection"] = "projection"
    epochs: int = 40
    learning_rate: float = 2e-3
    temperature: float = 2.0
    soft_share: float = 1.0


@apply.register
def _(step: Distil, network: Network, bench: Workbench) -> Network:
    if network is not bench.teacher:
        raise ConfigError(
            "'distil' makes a network of its own and would drop what the steps before it made; "
            "let it be the first step, or use 'finetune' to go on with a network"
        )
    student = student_of(step, network.config)
    weights = projected(student, network, bench.seed) if step.start == "projection" else None
    return teach(step, student, weights, bench, weights_key(network.state_dict()))


def student_of(step: Distil, teacher: NetworkConfig) -> NetworkConfig:
    """The student's config.

    Raises:
        ConfigError: its sizes do not fit each other.
    """
    given = teacher.encoder
    if not isinstance(given, EncoderConfig):
        given = EncoderConfig(max_length=given.max_length, block=BlockConfig(heads=1))
    block = given.block if isinstance(given.block, BlockConfig) else BlockConfig()
    encoder = replace(
        given,
        width=step.width,
        blocks=step.blocks,
        dropout=step.dropout,
        block=replace(block, heads=step.heads, expansion=step.expansion, head_width=None, hidden=None),
        each=(),
    )
    return replace(teacher, encoder=encoder, table="float32", linear="float32")


def projected(student: NetworkConfig, teacher: Network, seed: int) -> dict[str, Tensor]:
    """Random weights by the seed, with table and positions of the teacher in the directions that keep most of it.

    Raises:
        ConfigError: the teacher has fewer directions than the student asks for.
    """
    torch.manual_seed(seed)
    state = Network(student, teacher.n_items).state_dict()
    row_IE = teacher.encoder.items.rows().detach().cpu()
    if student.encoder.width > row_IE.shape[1]:
        raise ConfigError(
            f"start 'projection' cannot make width {student.encoder.width} of the teacher's {row_IE.shape[1]}; "
            "lower width or start from scratch"
        )
    _, _, direction_EE = torch.linalg.svd(row_IE, full_matrices=False)
    basis_ED = direction_EE[: student.encoder.width].t()
    state[TABLE] = row_IE @ basis_ED
    if isinstance(teacher.encoder, Encoder):
        state[POSITIONS] = teacher.encoder.position_TD.detach().cpu() @ basis_ED
    return state
