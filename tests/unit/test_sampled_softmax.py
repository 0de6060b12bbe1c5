"""Sampled softmax: equal to full softmax where it must be, in expectation where it can only be that.

# M tokens, K negatives, I items, D width
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.config import from_mapping, to_mapping
from elasticrec.errors import ConfigError
from elasticrec.model import loss
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.loss import Batch, FullSoftmax, Negatives, summed_loss
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sampled import (
    InBatch,
    LogUniform,
    Masked,
    Own,
    Popularity,
    SampledSoftmax,
    Source,
    Uniform,
    recommended_loss,
    summed_sampled_cross_entropy,
)
from elasticrec.training.negatives import Catalogue, NegativeSampler, expected_counts
from elasticrec.training.run import RunConfig

N_ITEMS, WIDTH, TOKENS = 240, 5, 40
COUNTS_I = np.array([20_000 // (place + 1) for place in range(N_ITEMS)])
CATALOGUE = Catalogue(n_items=N_ITEMS, counts=lambda: COUNTS_I, targets=lambda: COUNTS_I + 0.0)
SOURCES: dict[str, Source] = {
    "uniform": Uniform(negatives=120),
    "log_uniform": LogUniform(negatives=120),
    "popularity": Popularity(negatives=120, power=1.0),
    "in_batch": InBatch(),
    "in_batch and uniform": InBatch(uniform=50),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> Network:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=8, blocks=1, max_length=6, dropout=0.0)
    return Network(NetworkConfig(encoder=encoder), N_ITEMS)


def batch(negatives: Negatives | None) -> Batch:
    item_BT = torch.randint(1, N_ITEMS + 1, (7, 6), generator=torch.Generator().manual_seed(1))
    item_BT[2, :3] = 0
    return Batch(History(item_BT), torch.where(item_BT > 0, item_BT % N_ITEMS + 1, 0), negatives)


def every_item(source: Source) -> Negatives:
    sampler = NegativeSampler(SampledSoftmax(source=source), CATALOGUE, seed=0)
    item_K, log_weight_K, _ = sampler.negatives(3, np.array([1]))
    return Negatives(torch.from_numpy(item_K), torch.from_numpy(log_weight_K).float())


@pytest.mark.parametrize("source", [Uniform, LogUniform, Popularity])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"mask_seen": True}], ids=str)
def test_with_every_item_as_a_negative_it_is_full_softmax(options: dict[str, Any], source: type[Any]) -> None:
    grads = []
    for config in (FullSoftmax(**options), SampledSoftmax(**options)):
        model, given = network(), batch(every_item(source(negatives=N_ITEMS + 5)))
        value = summed_loss(config, model, model(given.history), given)
        value.backward()
        grads.append([value.detach(), *(parameter.grad for parameter in model.parameters())])
    for full, sampled in zip(*grads, strict=True):
        torch.testing.assert_close(sampled, full, rtol=1e-3, atol=2e-4)  # rows are short, so gradients are large


def test_label_smoothing_is_that_of_torch() -> None:
    model, given = network(), batch(None)
    own = summed_loss(FullSoftmax(label_smoothing=0.3), model, model(given.history), given)
    logits_BTI = model.head.query(model(given.history)) @ model.keys()[1:].t()
    target_M = given.target_BT[given.target_BT > 0] - 1
    logits_MI = logits_BTI[given.target_BT > 0]
    torch.testing.assert_close(own, F.cross_entropy(logits_MI, target_M, reduction="sum", label_smoothing=0.3))


def repeating_batch() -> Batch:
    """Items that come again as inputs and as targets, with padding."""
    item_BT = torch.tensor([[0, 0, 3, 4, 3, 5], [7, 8, 9, 7, 7, 2], [0, 0, 0, 0, 0, 1]])
    target_BT = torch.tensor([[0, 0, 4, 3, 5, 6], [8, 9, 7, 7, 2, 4], [0, 0, 0, 0, 0, 9]])
    return Batch(History(item_BT), target_BT, None)


@pytest.mark.parametrize("with_places", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_what_was_seen_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch, tokens: int, with_places: bool) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", tokens * 4 * N_ITEMS)
    model, given = network(), repeating_batch()
    if with_places:
        given = given._replace(place_M=(given.target_BT.flatten() > 0).nonzero().squeeze(1))
    own = summed_loss(FullSoftmax(mask_seen=True), model, model(given.history), given)
    expected = by_definition(model, given)
    torch.testing.assert_close(own, expected)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(own, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def by_definition(model: Network, given: Batch) -> Tensor:
    """Token by token, over the items that are the target or not among the inputs so far."""
    total = torch.zeros(())
    logits_BTI = model.head.query(model(given.history)) @ model.keys().t()
    for row, column in (given.target_BT > 0).nonzero().tolist():
        target = int(given.target_BT[row, column])
        seen = set(given.history.item_BT[row, : column + 1].tolist()) - {target}
        allowed = [item for item in range(1, N_ITEMS + 1) if item not in seen]
        total = total + logits_BTI[row, column, allowed].logsumexp(0) - logits_BTI[row, column, target]
    return total


def tensors(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query_MD, target_MD = (torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    negative_KD = torch.randn(9, WIDTH, generator=generator, dtype=dtype)
    log_weight_K = torch.randn(9, generator=generator, dtype=dtype)
    hit_M = torch.randint(-3, 9, (TOKENS,), generator=generator).clamp(min=-1)
    trained = tuple(part.requires_grad_() for part in (query_MD * 3, target_MD, negative_KD))
    return trained, log_weight_K, hit_M  # type: ignore[return-value]


def masked(hit_M: Tensor) -> Masked:
    """Leaves out one negative a token; -1: none."""
    n_negatives = int(hit_M.max()) + 1
    place_I = torch.cat([torch.arange(n_negatives), torch.tensor([-1])])
    return Masked(place_I, torch.where(hit_M >= 0, hit_M, n_negatives))


def sampled_loss(query_MD: Tensor, target_MD: Tensor, negative_KD: Tensor, weight_K: Tensor, hit_M: Tensor) -> Tensor:
    return summed_sampled_cross_entropy(query_MD, target_MD, negative_KD, weight_K, masked(hit_M))


def reference(query_MD: Tensor, target_MD: Tensor, negative_KD: Tensor, weight_K: Tensor, hit_M: Tensor) -> Tensor:
    logits_MK = query_MD @ negative_KD.t() + weight_K
    hit_MK = torch.arange(len(weight_K)) == hit_M[:, None]
    target_M1 = (query_MD * target_MD).sum(dim=1, keepdim=True)
    logits_ML = torch.cat([target_M1, logits_MK.masked_fill(hit_MK, float("-inf"))], dim=1)
    return F.cross_entropy(logits_ML, torch.zeros(len(query_MD), dtype=torch.int64), reduction="sum")


@pytest.mark.parametrize("tokens", [1, 7, 39, 1000])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", tokens * 4 * 9)
    trained, weight_K, hit_M = tensors(torch.float32)
    own, expected = (way(*trained, weight_K, hit_M) for way in (sampled_loss, reference))
    torch.testing.assert_close(own, expected)
    for mine, theirs in zip(
        torch.autograd.grad(own * 0.3, trained), torch.autograd.grad(expected * 0.3, trained), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_products_of_bfloat16_factors_are_summed_in_float32() -> None:
    trained, weight_K, hit_M = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        own = sampled_loss(*trained, weight_K, hit_M)
    expected = reference(*trained, weight_K, hit_M)
    assert own.dtype == torch.float32
    assert own.item() != expected.item()
    torch.testing.assert_close(own, expected, rtol=5e-3, atol=0)
    for mine, theirs in zip(torch.autograd.grad(own, trained), torch.autograd.grad(expected, trained), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_the_gradient_is_the_one_that_differences_show() -> None:
    trained, weight_K, hit_M = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *parts: sampled_loss(*parts, weight_K, hit_M), trained)


def test_a_token_whose_only_negative_is_its_target_has_no_loss() -> None:
    row_1D = torch.ones(1, WIDTH)
    value = sampled_loss(row_1D, row_1D, row_1D, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert value.item() == 0


# Expectations


def mean_gradient(draws: int, negatives_of: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Of the items' vectors (I, D), over draws."""
    generator = torch.Generator().manual_seed(2)
    query_MD, item_ID = (torch.randn(rows, WIDTH, generator=generator) for rows in (TOKENS, N_ITEMS + 1))
    target_M = torch.from_numpy(targets(0))
    query_MD = query_MD / 2  # a ratio of means is no mean of ratios: the less scores vary, the closer they are
    item_ID.requires_grad_()
    for step in range(draws):
        item_K, log_weight_K = (torch.from_numpy(part) for part in negatives_of(step))
        place_I = torch.full((N_ITEMS + 1,), -1)
        place_I[item_K] = torch.arange(len(item_K))
        summed_sampled_cross_entropy(
            query_MD, item_ID[target_M], item_ID[item_K], log_weight_K.float(), Masked(place_I, target_M)
        ).backward()
    assert item_ID.grad is not None
    return item_ID.grad / draws


def targets(step: int) -> np.ndarray:
    """Targets of a step, as frequent as the events."""
    generator = np.random.default_rng([7, step])
    return generator.choice(np.arange(1, N_ITEMS + 1), 400 if step else TOKENS, p=COUNTS_I / COUNTS_I.sum())


def sampled(source: Source, log_q: bool = True) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    sampler = NegativeSampler(SampledSoftmax(source=source, log_q=log_q), CATALOGUE, seed=5)
    return lambda step: sampler.negatives(step, targets(step + 1))[:2]


def full(step: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1, N_ITEMS + 1), np.zeros(N_ITEMS)


@pytest.mark.parametrize("name", SOURCES)
def test_the_gradient_is_that_of_full_softmax_in_the_mean(name: str) -> None:
    expected_ID = mean_gradient(1, full)
    deviation = (mean_gradient(150, sampled(SOURCES[name])) - expected_ID).norm() / expected_ID.norm()
    assert deviation < 0.06


def loss_of_one_user(source: Source | None, draws: int = 50) -> float:
    """Whose items are alike, rare, and all in each step; others are drawn by popularity. Without a source in full."""
    target_BT, count_I = torch.tensor([[0, 170, 181, 170, 200, 230]]), COUNTS_I.copy()
    target_M = target_BT[0, 1:]
    count_I[target_M.numpy() - 1] = 1
    item_ID = torch.randn(N_ITEMS + 1, WIDTH, generator=torch.Generator().manual_seed(4))
    item_ID[target_M] = item_ID[170].clone()
    query_MD, given = item_ID[170].expand(len(target_M), -1), Batch(History(target_BT), target_BT)
    catalogue = Catalogue(n_items=N_ITEMS, counts=lambda: count_I, targets=lambda: count_I + 0.0)
    generator, total = np.random.default_rng(3), 0.0
    for step in range(draws if source else 1):
        others_M = generator.choice(N_ITEMS, 4_000, p=count_I / count_I.sum()) + 1
        drawn: Any = (*full(0), None)
        if source is not None:
            sampler = NegativeSampler(SampledSoftmax(source=source), catalogue, 5)
            drawn = sampler.negatives(step, np.concatenate([target_M.numpy(), others_M]))
        item_K, log_weight_K, log_expected_K = (None if part is None else torch.from_numpy(part) for part in drawn)
        place_I = torch.full((N_ITEMS + 1,), -1)
        place_I[item_K] = torch.arange(len(item_K))
        own = None if log_expected_K is None else Own.of(given, place_I, log_expected_K.float())
        masked = Masked(place_I, target_M)
        total += summed_sampled_cross_entropy(
            query_MD, item_ID[target_M], item_ID[item_K], log_weight_K.float(), masked, own
        ).item()
    return total / (draws if source else 1)


def test_a_batch_corrects_each_token_by_its_own_window() -> None:
    model, given = network(), repeating_batch()
    item_K, weight_K, expected_K = (
        torch.tensor([3, 4, 7, 9, 50]),
        torch.ones(5) * 0.3,
        torch.tensor([0.5, 2, 0.1, 1, 3]),
    )
    negatives = Negatives(item_K, weight_K, expected_K.log())
    own = summed_loss(SampledSoftmax(), model, model(given.history), given._replace(negatives=negatives))
    total, logits_BTI = torch.zeros(()), model.head.query(model(given.history)) @ model.keys().t()
    for row, column in (given.target_BT > 0).nonzero().tolist():
        target = int(given.target_BT[row, column])
        times_K = torch.tensor([(given.target_BT[row] == item).sum().item() for item in item_K])
        weighted_K = logits_BTI[row, column, item_K] + weight_K + (expected_K / (expected_K + times_K)).log()
        weighted_K[item_K == target] = float("-inf")
        logit = logits_BTI[row, column, target]
        total = total + torch.cat([weighted_K, logit[None]]).logsumexp(0) - logit
    torch.testing.assert_close(own, total)


@pytest.mark.parametrize("source", [InBatch(), InBatch(uniform=50)])
@pytest.mark.parametrize("tokens", [2, 1000])
def test_the_targets_of_an_own_window_do_not_count_for_many(
    monkeypatch: pytest.MonkeyPatch, source: Source, tokens: int
) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", tokens * 4 * N_ITEMS)
    assert loss_of_one_user(source) == pytest.approx(loss_of_one_user(None), rel=0.02)


@pytest.mark.parametrize("name", ["log_uniform", "popularity", "in_batch"])
def test_without_the_correction_it_is_another_gradient(name: str) -> None:
    expected_ID = mean_gradient(1, full)
    deviation = (mean_gradient(150, sampled(SOURCES[name], log_q=False)) - expected_ID).norm() / expected_ID.norm()
    assert deviation > 0.12


@pytest.mark.parametrize("name", SOURCES)
def test_items_come_up_as_often_as_the_correction_says(name: str) -> None:
    weighted: Counter[int] = Counter()
    draws = 400
    for step in range(draws):
        item_K, log_weight_K = sampled(SOURCES[name])(step)
        assert (np.diff(item_K) > 0).all()
        assert item_K[0] >= 1
        assert item_K[-1] <= N_ITEMS
        weighted.update(dict(zip(item_K.tolist(), np.exp(log_weight_K).tolist(), strict=True)))
    # In the mean a negative stands for one item, whichever it is; the rarest come up a hundred times.
    assert [weighted[item] / draws for item in range(1, N_ITEMS + 1)] == pytest.approx([1] * N_ITEMS, abs=0.4)


def test_an_item_comes_up_by_its_weight_and_at_most_once() -> None:
    weight_I = np.array([8.0, 4.0, 2.0, 1.0, 1.0])
    assert expected_counts(weight_I, 1).tolist() == [0.5, 0.25, 0.125, 0.0625, 0.0625]
    assert expected_counts(weight_I, 3).tolist() == [1, 1, 0.5, 0.25, 0.25]
    assert expected_counts(weight_I, 5).tolist() == expected_counts(weight_I, 9).tolist() == [1] * 5


def test_negatives_follow_from_seed_and_step() -> None:
    config = SampledSoftmax(source=Popularity(negatives=12))
    drawn = {
        (seed, step): NegativeSampler(config, CATALOGUE, seed).negatives(step, targets(1))[0].tolist()
        for seed in (0, 1)
        for step in (0, 1)
    }
    again = NegativeSampler(config, CATALOGUE, 1)
    again.negatives(0, targets(1))
    assert again.negatives(1, targets(1))[0].tolist() == drawn[1, 1]
    assert len({tuple(items) for items in drawn.values()}) == 4


# Choice and mistakes


def test_a_file_can_ask_for_it() -> None:
    asked = {"loss": {"kind": "sampled_softmax", "source": {"kind": "popularity", "negatives": 99}, "log_q": False}}
    run = from_mapping(RunConfig, asked)
    assert run.loss == SampledSoftmax(source=Popularity(negatives=99), log_q=False)
    assert from_mapping(RunConfig, to_mapping(run)) == run


def test_large_catalogues_are_sampled() -> None:
    assert recommended_loss(100_000) == FullSoftmax()
    assert recommended_loss(100_001) == SampledSoftmax()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(negatives=0), "negatives 0 must be at least 1"),
        (lambda: LogUniform(negatives=0), "negatives 0 must be at least 1"),
        (lambda: Popularity(negatives=-1), "negatives -1 must be at least 1"),
        (lambda: Popularity(power=-0.5), "power -0.5 must be at least 0"),
        (lambda: InBatch(uniform=-1), "uniform -1 must be at least 0"),
        (lambda: SampledSoftmax(label_smoothing=1.0), "label_smoothing 1.0 must be at least 0 and below 1"),
        (lambda: FullSoftmax(label_smoothing=0.1, mask_seen=True), "label_smoothing spreads over the whole catalogue"),
        (lambda: FullSoftmax(label_smoothing=-0.1), "label_smoothing -0.1 must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize("power", [float("inf"), float("nan")])
def test_a_power_that_weighs_nothing_is_refused(power: float) -> None:
    with pytest.raises(ConfigError, match=f"power {power} must be at least 0 and finite"):
        Popularity(power=power)


@pytest.mark.parametrize("power", [110.0, 1e4, 1e308])
def test_the_steepest_power_draws_the_most_popular_items(power: float) -> None:
    sampler = NegativeSampler(SampledSoftmax(source=Popularity(negatives=12, power=power)), CATALOGUE, seed=0)
    item_K, log_weight_K, _ = sampler.negatives(0, targets(1))
    assert item_K[:10].tolist() == list(range(1, 11))
    assert np.isfinite(log_weight_K).all()


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_items_are_drawn_by_the_power_of_their_events(power: float) -> None:
    sampler = NegativeSampler(SampledSoftmax(source=Popularity(negatives=12, power=power)), CATALOGUE, seed=0)
    item_K, log_weight_K, _ = sampler.negatives(0, targets(1))
    expected_I = expected_counts((COUNTS_I + 1.0) ** power, 12)
    np.testing.assert_allclose(np.exp(-log_weight_K), expected_I[item_K - 1], rtol=1e-12)
