"""Rows that are trained when they are touched, against a table of which every row moves in every step.

# I items + 1, D width, U rows of a step
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticrec.model.quantized import FloatTable
from elasticrec.training.optimizer import OptimizerConfig, average_decay, learning_rate
from elasticrec.training.rows import MissedSteps, TouchedRows

ROWS, WIDTH, STEPS = 30, 4, 60
CONFIGS = {
    "usual": OptimizerConfig(learning_rate=0.05, weight_decay=0.3, warmup_steps=10, ema_decay=0.97),
    "without average": OptimizerConfig(learning_rate=0.05, ema_decay=0.0, warmup_steps=3),
    "without decay": OptimizerConfig(learning_rate=0.05, weight_decay=0.0, ema_decay=0.9, warmup_steps=3),
}


def touched(step: int, share: float = 0.2) -> Tensor:
    chosen_I = torch.rand(ROWS, generator=torch.Generator().manual_seed(step)) < share
    chosen_I[0] = True
    return chosen_I.nonzero().squeeze(1)


def gradient(step: int, rows: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1000 + step))


class Lazy:
    """The table under test, its average, and a way to take steps."""

    def __init__(self, config: OptimizerConfig) -> None:
        torch.manual_seed(0)
        self.table = FloatTable(ROWS, WIDTH)
        self.average_ID = self.table.weight_ID.detach().clone()
        self.rows = TouchedRows(self.table, self.average_ID, config, lambda step: learning_rate(config, step, STEPS))

    def take(self, step: int, share: float = 0.2) -> None:
        item_U = touched(step, share)
        self.rows.begin(step, item_U)
        (self.table.rows() * gradient(step, len(item_U))).sum().backward()
        self.rows.update(step)
        self.rows.end()


def dense(config: OptimizerConfig, share: float) -> tuple[Tensor, Tensor]:
    """All rows in each step: decay and average always, a gradient and moments where a row is touched."""
    torch.manual_seed(0)
    weight_ID = FloatTable(ROWS, WIDTH).weight_ID.detach().double()
    average_ID, mean_ID, square_ID = weight_ID.clone(), torch.zeros_like(weight_ID), torch.zeros_like(weight_ID)
    beta1, beta2 = config.betas
    for step in range(STEPS):
        rate, item_U = learning_rate(config, step, STEPS), touched(step, share)
        gradient_UD = gradient(step, len(item_U)).double()
        mean_ID[item_U] = beta1 * mean_ID[item_U] + (1 - beta1) * gradient_UD
        square_ID[item_U] = beta2 * square_ID[item_U] + (1 - beta2) * gradient_UD**2
        weight_ID *= 1 - rate * config.weight_decay
        root_UD = (square_ID[item_U] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
        weight_ID[item_U] -= rate * mean_ID[item_U] / (1 - beta1 ** (step + 1)) / root_UD
        decay = average_decay(config.ema_decay, step)
        average_ID = decay * average_ID + (1 - decay) * weight_ID
    return weight_ID.float(), average_ID.float()


def missed_one_by_one(config: OptimizerConfig, rate: float, since: int, now: int) -> tuple[float, float, float]:
    keep, decay, share = 1.0, 1.0, 0.0
    for step in range(since, now):
        keep *= 1 - rate * config.weight_decay
        share = average_decay(config.ema_decay, step) * share + (1 - average_decay(config.ema_decay, step)) * keep
        decay *= average_decay(config.ema_decay, step)
    return keep, decay, share


@pytest.mark.parametrize(
    ("rate", "weight_decay", "ema_decay"), [(1e-2, 0.5, 0.999), (0.1, 9.0, 0.999), (1e-3, 0.1, 0.99)]
)
def test_a_decay_stronger_than_the_average_is_slow_leaves_nothing_to_rounding(
    rate: float, weight_decay: float, ema_decay: float
) -> None:
    """Over 12,500 steps the number that is kept would grow by a factor of 10^21, and to infinity."""
    config = OptimizerConfig(learning_rate=rate, weight_decay=weight_decay, ema_decay=ema_decay)
    missed, now = MissedSteps(config, lambda _: rate), 12_500
    missed.factors(np.array([0]), now + 500)  # what is known goes beyond what is asked
    since_U = np.array([now, now - 1, now - 50, now - 3_000, 0])
    found_U3 = np.array(missed.factors(since_U, now)).T
    expected_U3 = [missed_one_by_one(config, rate, int(since), now) for since in since_U]
    np.testing.assert_allclose(found_U3, expected_U3, rtol=1e-8, atol=1e-300)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("share", [0.03, 0.2, 1.0])
@pytest.mark.parametrize("flushes", [(), (1, 17, 18, 40)])
def test_rows_that_waited_have_missed_nothing(name: str, share: float, flushes: tuple[int, ...]) -> None:
    lazy = Lazy(CONFIGS[name])
    for step in range(STEPS):
        if step in flushes:
            lazy.rows.flush(step)
        lazy.take(step, share)
    lazy.rows.flush(STEPS)
    weight_ID, average_ID = dense(CONFIGS[name], share)
    torch.testing.assert_close(lazy.table.weight_ID.detach(), weight_ID, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lazy.average_ID, average_ID, rtol=2e-5, atol=2e-6)


def test_where_every_step_touches_all_it_is_adamw() -> None:
    config = CONFIGS["usual"]
    lazy = Lazy(config)
    torch.manual_seed(0)
    parameter = nn.Parameter(FloatTable(ROWS, WIDTH).weight_ID.detach().clone())
    optimizer = torch.optim.AdamW([parameter], betas=config.betas, weight_decay=config.weight_decay, fused=True)
    for step in range(STEPS):
        lazy.take(step, share=1.1)
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, STEPS)
        parameter.grad = gradient(step, ROWS)
        optimizer.step()
    torch.testing.assert_close(lazy.table.weight_ID.detach(), parameter.detach(), rtol=1e-5, atol=1e-6)


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    whole, resumed = Lazy(CONFIGS["usual"]), Lazy(CONFIGS["usual"])
    for step in range(STEPS):
        whole.take(step)
        if step == 25:
            with torch.no_grad():
                resumed.table.weight_ID.copy_(whole.table.weight_ID)
            resumed.average_ID.copy_(whole.average_ID)
            resumed.rows.load_state({name: tensor.clone() for name, tensor in whole.rows.state().items()})
        if step > 25:
            resumed.take(step)
    for lazy in (whole, resumed):
        lazy.rows.flush(STEPS)
    assert torch.equal(whole.table.weight_ID, resumed.table.weight_ID)
    assert torch.equal(whole.average_ID, resumed.average_ID)
    for name, tensor in whole.rows.state().items():
        assert torch.equal(tensor, resumed.rows.state()[name]), name


def test_within_a_step_the_rows_stand_for_the_table() -> None:
    lazy, item_U = Lazy(CONFIGS["usual"]), torch.tensor([0, 3, 7, 29])
    before_UD = lazy.table(item_U)
    lazy.rows.begin(0, item_U)
    assert torch.equal(lazy.table(torch.arange(4)), before_UD)
    assert torch.equal(lazy.table.directions(), F.normalize(before_UD, dim=-1))
    assert not lazy.table.weight_ID.requires_grad
    lazy.rows.end()
    assert lazy.table.rows() is lazy.table.weight_ID


def test_a_step_without_a_gradient_only_decays() -> None:
    lazy, item_U = Lazy(CONFIGS["usual"]), torch.arange(ROWS)
    before_ID = lazy.table.weight_ID.detach().clone()
    lazy.rows.begin(0, item_U)
    lazy.rows.update(0)
    lazy.rows.end()
    rate = learning_rate(CONFIGS["usual"], 0, STEPS)
    torch.testing.assert_close(lazy.table.weight_ID.detach(), before_ID * (1 - rate * 0.3))


def test_a_long_wait_neither_overflows_nor_is_lost() -> None:
    """The average of a row that waited 100,000 steps is the row itself."""
    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.0, ema_decay=0.9)
    torch.manual_seed(0)
    table = FloatTable(ROWS, WIDTH)
    average_ID = torch.zeros_like(table.weight_ID.detach())
    rows = TouchedRows(table, average_ID, config, lambda _: 1e-3)
    rows.flush(100_000)
    torch.testing.assert_close(average_ID, table.weight_ID.detach())
