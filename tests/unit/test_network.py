"""The network: what a position may depend on, what the scores are, where gradients go; and the loss, to the letter."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.errors import ConfigError
from elasticrec.model import loss
from elasticrec.model.bias import Scene
from elasticrec.model.block import Block, BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.head import CosineHead, HeadConfig
from elasticrec.model.history import History
from elasticrec.model.layout import Layout
from elasticrec.model.loss import Batch, FullSoftmax, SummedLoss, summed_cross_entropy
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.unit import fused_unit, unit

N_ITEMS = 40
T = 8
GATES = pytest.mark.parametrize("residual_gates", [False, True])


def network_of(residual_gates: bool = False, dropout: float = 0.0) -> Network:
    """A network whose biases by distance are not zero, as they would be at the start of training."""
    torch.manual_seed(0)
    block = BlockConfig(heads=2, residual_gates=residual_gates)
    encoder = EncoderConfig(width=16, blocks=2, max_length=T, dropout=dropout, block=block)
    network = Network(NetworkConfig(encoder=encoder), N_ITEMS)
    for name, parameter in network.named_parameters():
        if name.endswith("weight_NT"):
            torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


def items_BT(batch: int = 6) -> Tensor:
    return torch.randint(1, N_ITEMS + 1, (batch, T), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def other_item(item_B: Tensor) -> Tensor:
    return item_B % N_ITEMS + 1


@GATES
@pytest.mark.parametrize("changed", range(T))
@torch.no_grad()
def test_a_later_event_does_not_reach_earlier_positions(changed: int, residual_gates: bool) -> None:
    network, before_BT = network_of(residual_gates), items_BT()
    after_BT = before_BT.clone()
    after_BT[:, changed] = other_item(before_BT[:, changed])
    before_BTD, after_BTD = network(History(before_BT)), network(History(after_BT))
    assert torch.equal(before_BTD[:, :changed], after_BTD[:, :changed])
    difference_BT = (before_BTD - after_BTD).abs().amax(dim=-1)[:, changed:]
    assert (difference_BT > 1e-4).all(), "every later position sees the change"


@GATES
@pytest.mark.parametrize("events", range(1, T))
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(events: int, residual_gates: bool) -> None:
    network, short_BT = network_of(residual_gates), items_BT()[:, -events:]
    padded_BT = F.pad(short_BT, (T - events, 0))
    assert torch.allclose(network(History(padded_BT))[:, -events:], network(History(short_BT)), atol=1e-6)
    assert torch.allclose(
        network.scores(History(padded_BT))[:, 1:], network.scores(History(short_BT))[:, 1:], atol=1e-5
    )


@torch.no_grad()
def test_the_order_of_events_matters() -> None:
    network, item_BT = network_of(), items_BT()
    swapped_BT = item_BT[:, [1, 0, *range(2, T)]]
    assert not torch.allclose(network(History(item_BT))[:, -1], network(History(swapped_BT))[:, -1], atol=1e-4)


@torch.no_grad()
def test_the_biases_by_distance_are_relative_and_causal() -> None:
    bias = network_of().encoder.blocks[0].get_submodule("attention.bias")
    bias_NTT = bias.masked(Scene(Layout(torch.ones(1, 5))))[0]
    weight_NT = bias.get_parameter("weight_NT")
    for i in range(5):
        for j in range(5):
            expected_N = weight_NT[:, i - j] if j <= i else torch.full((2,), -math.inf)
            assert torch.equal(bias_NTT[:, i, j], expected_N)


def test_an_empty_history_gives_numbers() -> None:
    score_BI = network_of().scores(History(torch.zeros(2, T, dtype=torch.int32)))
    assert score_BI[:, 1:].isfinite().all()


@GATES
def test_scores_are_cosines_over_the_temperature_and_never_the_padding(residual_gates: bool) -> None:
    network, item_BT = network_of(residual_gates), items_BT()
    score_BI = network.scores(History(item_BT))
    assert score_BI.shape == (len(item_BT), N_ITEMS + 1)
    assert score_BI.dtype == torch.float32
    assert (score_BI[:, 0] == -math.inf).all()
    assert score_BI[:, 1:].isfinite().all()
    with torch.no_grad():
        h_BD, weight_ID = network(History(item_BT))[:, -1], network.encoder.items.weight_ID
        expected_BI = F.cosine_similarity(h_BD[:, None], weight_ID[None, 1:], dim=-1) / HeadConfig().temperature
    assert torch.allclose(score_BI[:, 1:], expected_BI, atol=1e-4)


@torch.no_grad()
def test_the_query_of_the_head_holds_the_scale() -> None:
    network, h_BD = network_of(), torch.randn(3, 16)
    score_BI = network.head.query(h_BD) @ network.encoder.items.directions().t()
    assert torch.allclose(score_BI, network.head(h_BD, network.encoder.items), atol=1e-5)
    assert network.head.query(h_BD).norm(dim=-1).tolist() == pytest.approx([1 / 0.05] * 3)


@GATES
def test_a_gradient_reaches_every_parameter(residual_gates: bool) -> None:
    network, item_BT = network_of(residual_gates, dropout=0.1).train(), items_BT(batch=64)
    target_BT = torch.roll(item_BT, -1, dims=1)
    SummedLoss(network, FullSoftmax())(Batch(History(item_BT), target_BT)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        missed = (parameter.grad == 0).flatten(1).all(dim=1) if parameter.dim() > 1 else parameter.grad == 0
        expected = [0] if name.endswith("items.weight_ID") else []  # row 0 pads
        assert missed.nonzero().flatten().tolist() == expected, name


def test_residual_gates_are_parameters_that_can_close_a_block() -> None:
    plain, gated = network_of(False), network_of(True)
    extra = {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert extra == {
        f"encoder.blocks.{block}.{gate}_gate.{part}"
        for block in (0, 1) for gate in ("attention", "feed_forward") for part in ("weight", "bias")
    }  # fmt: skip
    block = gated.encoder.blocks[0]
    with torch.no_grad():
        for gate in ("attention_gate", "feed_forward_gate"):
            block.get_parameter(f"{gate}.weight").zero_()
            block.get_parameter(f"{gate}.bias").fill_(-100)
        x_MD = torch.randn(2 * T, 16)
        assert torch.equal(block(x_MD, Scene(Layout(torch.ones(2, T)))), x_MD)


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    network, item_BT = network_of(dropout=0.5), items_BT()
    assert torch.equal(network(History(item_BT)), network(History(item_BT)))
    network.train()
    assert not torch.equal(network(History(item_BT)), network(History(item_BT)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EncoderConfig(width=10, block=BlockConfig(heads=4)), "width 10 does not divide over 4 heads; change"),
        (lambda: Block(BlockConfig(heads=4), 10, 5, 0.0), "width 10 does not divide over 4 heads; change"),
        (lambda: EncoderConfig(blocks=0), "blocks 0 and max_length 50 must be >= 1"),
        (lambda: EncoderConfig(dropout=1.0), "dropout 1.0 must be at least 0 and below 1"),
        (lambda: BlockConfig(heads=0), "heads >= 1"),
        (lambda: BlockConfig(expansion=0), "expansion > 0"),
        (lambda: HeadConfig(temperature=0), "temperature 0 must be above 0"),
    ],
)
def test_impossible_sizes_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)


def test_the_temperature_starts_as_configured() -> None:
    assert CosineHead(HeadConfig(temperature=0.2), 16).log_scale.exp().item() == pytest.approx(5)


# The loss


def queries(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query_MD = torch.randn(23, 6, generator=generator, dtype=dtype) * 4
    item_ID = torch.randn(17, 6, generator=generator, dtype=dtype)
    target_M = torch.randint(0, 17, (23,), generator=generator)
    return query_MD.requires_grad_(), item_ID.requires_grad_(), target_M


@pytest.mark.parametrize("rows", [1, 2, 5, 22, 23, 24, 1000])
def test_the_chunked_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", rows * 4 * 17)
    query_MD, item_ID, target_M = queries()
    own = summed_cross_entropy(query_MD, item_ID, target_M)
    own_grads = torch.autograd.grad(own * 0.3, (query_MD, item_ID))
    reference = F.cross_entropy(query_MD @ item_ID.t(), target_M, reduction="sum")
    reference_grads = torch.autograd.grad(reference * 0.3, (query_MD, item_ID))
    assert own.item() == pytest.approx(reference.item(), rel=1e-6)
    for mine, theirs in zip(own_grads, reference_grads, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 500, 2**20])
def test_the_chunked_loss_has_the_gradient_that_differences_show(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(loss, "MIN_CHUNK", 1)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", chunk_bytes)
    query_MD, item_ID, target_M = queries(torch.float64)
    assert torch.autograd.gradcheck(lambda q_MD, i_ID: summed_cross_entropy(q_MD, i_ID, target_M), (query_MD, item_ID))


def test_the_chunked_loss_withstands_large_logits() -> None:
    query_MD, item_ID, target_M = queries()
    own = summed_cross_entropy(query_MD * 1e3, item_ID, target_M)
    assert own.item() == pytest.approx(
        F.cross_entropy(query_MD * 1e3 @ item_ID.t(), target_M, reduction="sum").item(), rel=1e-5
    )
    assert torch.autograd.grad(own, query_MD)[0].isfinite().all()


def test_full_softmax_sums_over_what_is_no_padding() -> None:
    network, input_BT = network_of(), items_BT()
    target_BT = torch.roll(input_BT, -1, dims=1)
    input_BT[2, :5] = target_BT[2, :5] = 0
    total = SummedLoss(network, FullSoftmax())(Batch(History(input_BT), target_BT))
    logits_BTI = network.head(network(History(input_BT)).flatten(0, 1), network.encoder.items)[:, 1:]
    keep = target_BT.flatten() != 0
    expected = F.cross_entropy(logits_BTI[keep], target_BT.flatten()[keep].long() - 1, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_any_target_the_loss_is_zero_and_so_is_every_gradient() -> None:
    network, empty_BT = network_of(), torch.zeros(1, T, dtype=torch.int32)
    total = SummedLoss(network, FullSoftmax())(Batch(History(empty_BT), empty_BT))
    total.backward()
    assert total.item() == 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 6)])
def test_fused_unit_vectors(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch has them, and their gradient; a row of zeros, as padding is, is divided by almost nothing."""
    compiled = functools.cache(functools.partial(torch.compile, backend="aot_eager"))  # no kernels
    monkeypatch.setattr("elasticrec.model.unit._compiled", compiled)
    x_D = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_D[0] = 0.0
    grad_D = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (unit, fused_unit):
        own_D = (x_D * 1.0).requires_grad_()
        unit_D = function(own_D * 2.0)  # no leaf, of which torch's compiler would warn
        unit_D.backward(grad_D)
        assert own_D.grad is not None
        found.append((unit_D.detach(), own_D.grad))
    torch.testing.assert_close(found[1], found[0])
    with torch.no_grad():
        assert torch.equal(fused_unit(x_D), unit(x_D))
    (grad_D,) = torch.autograd.grad((fused_unit(own_D) ** 3).sum(), own_D, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # and no zeros in silence
        grad_D.sum().backward()


@pytest.mark.parametrize("scale", [20, 100])  # as heads start, and where a temperature may fall to
@pytest.mark.parametrize("chunk_bytes", [2**16, 2**24])  # several chunks and one
def test_narrow_logits(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, scale: int) -> None:
    """What a GPU's kernel is given, and writes its gradient over; queries near their answers, items near each other."""

    def in_place(logits_mI: Tensor, target_m1: Tensor, products: torch.dtype) -> tuple[Tensor, Tensor]:
        assert logits_mI.dtype == products == torch.float16
        total, grad_mI = loss.softmax_gradient_in_place(logits_mI.float(), target_m1, torch.float32)
        return total, logits_mI.copy_(grad_mI * loss.gradient_scale(products))

    monkeypatch.setattr(loss, "fused_softmax", lambda *_: loss.Softmax(in_place, narrow=True))
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    noise = functools.partial(torch.randn, generator=generator)
    item_ID = F.normalize(noise(20, 32).repeat_interleave(40, 0)[:777] + 0.5 * noise(777, 32), dim=1)
    target_M = torch.randint(0, 777, (300,), generator=generator)
    query_MD = F.normalize(item_ID[target_M] + 0.1 * noise(300, 32), dim=1) * scale
    target_M[-9:] = -1
    found = []
    for fused in (False, True):
        query, item = query_MD.clone().requires_grad_(), item_ID.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=fused):
            total = summed_cross_entropy(query, item, target_M, fused=fused)
        total.backward()
        assert query.grad is not None
        assert item.grad is not None
        assert item.grad.any(dim=1).float().mean() > 0.99  # items that nobody would take are told so, too
        found.append((total.detach(), query.grad, item.grad))
    for expected, own in zip(*found, strict=True):
        assert (own - expected).norm() < 2e-4 * scale * expected.norm()  # bfloat16 is at 4 times that and more
