"""Dropout of our own: the share, the scale, independence of the entries that share a random number, and the seed."""

import pytest
import torch

from elasticrec.model.dropout import Dropout, mask

N = 400_000


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_share_and_mean(p: float) -> None:
    torch.manual_seed(0)
    made_S = mask(torch.ones(N), p)
    error = (p * (1 - p) / N) ** 0.5
    assert abs(float((made_S == 0).double().mean()) - p) < 5 * error
    assert made_S.max() == pytest.approx(1 / (1 - p), rel=1e-3)
    assert abs(float(made_S.double().mean()) - 1) < 6 * error / (1 - p)


def test_entries_of_one_number_are_independent() -> None:
    torch.manual_seed(0)
    kept_N4 = (mask(torch.ones(N, 4), 0.3) > 0).double()
    correlation_44 = torch.corrcoef(kept_N4.T)
    assert float((correlation_44 - torch.eye(4)).abs().max()) < 5 / N**0.5


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1,), (0, 4), (2, 3, 9)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x_S = torch.ones(shape)
    assert Dropout(0.5)(x_S).shape == x_S.shape


def test_the_seed_decides() -> None:
    layer, x_S = Dropout(0.5), torch.ones(1001)
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(layer(x_S))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_gradient_is_the_mask() -> None:
    x_S = torch.ones(1000, requires_grad=True)
    y_S = Dropout(0.25)(x_S)
    y_S.sum().backward()
    assert x_S.grad is not None
    assert torch.equal(x_S.grad, y_S.detach())


def test_evaluation_and_a_share_of_zero_change_nothing() -> None:
    x_S = torch.randn(100)
    assert Dropout(0.5).eval()(x_S) is x_S
    assert Dropout(0.0)(x_S) is x_S


def test_a_share_next_to_one_stays_finite() -> None:
    assert torch.isfinite(mask(torch.ones(1000), 0.9999999)).all()
