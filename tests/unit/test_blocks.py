"""All encoders and blocks by one suite: causal, blind to padding, alike packed and static; and what each reads.

# B users, T positions, D width
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from elasticrec.config import from_mapping, to_mapping
from elasticrec.data.inputs import Inputs
from elasticrec.data.sequences import Sequences
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import histories
from elasticrec.model.bias import RelativeBias, Scene, TimeGaps
from elasticrec.model.block import BlockConfig, attend
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.features import EventInput, RatingInput
from elasticrec.model.head import DotHeadConfig, HeadConfig
from elasticrec.model.history import History
from elasticrec.model.hstu import HSTUBlockConfig
from elasticrec.model.layout import Layout, Packed, layout_of
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import AnyEncoder, AnyHead, Network, NetworkConfig
from elasticrec.model.sasrec import SASRecBlockConfig

N_ITEMS, T = 40, 8
EVERYTHING = {
    "time": TimeGaps(buckets=16),
    "rating": RatingInput(lowest=1, highest=5, buckets=4),
    "event": EventInput(types=("view", "buy")),
}
BLOCKS = {
    "gated": BlockConfig(),
    "ligr": BlockConfig(residual_gates=True),
    "hstu": HSTUBlockConfig(),
    "sasrec": SASRecBlockConfig(heads=2),
    "sasrec post gelu": SASRecBlockConfig(norm="post", activation="gelu"),
}
ENCODERS: dict[str, AnyEncoder] = {
    **{name: EncoderConfig(width=16, max_length=T, dropout=0.0, block=block) for name, block in BLOCKS.items()},
    **{
        f"{name}, all inputs": EncoderConfig(width=16, max_length=T, dropout=0.0, block=block, **EVERYTHING)  # type: ignore[arg-type]
        for name, block in BLOCKS.items()
    },
    "mean": MeanEncoderConfig(width=16, max_length=T, dropout=0.0),
}
WAYS = pytest.mark.parametrize("name", ENCODERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost such small products more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network_of(encoder: AnyEncoder, head: AnyHead | None = None) -> Network:
    """Nothing is zero, as biases and features are at the start of training."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=encoder, head=head or HeadConfig()), N_ITEMS)
    for parameter in network.encoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return network.eval()


def history_of(lengths: tuple[int, ...] = (T,) * 6) -> History:
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), T)
    time_BT = torch.randint(1, 10**6, shape, generator=generator).cumsum(dim=1)
    history = History(
        torch.randint(1, N_ITEMS + 1, shape, generator=generator, dtype=torch.int32),
        time_BT,
        torch.cat([time_BT[:, 1:], time_BT[:, -1:] + 77], dim=1),
        torch.randint(1, 6, shape, generator=generator).float(),
        torch.randint(0, 2, shape, generator=generator).to(torch.int16),
    )
    keep_BT = torch.arange(T)[None, :] >= T - torch.tensor(lengths)[:, None]
    return History(*(part * keep_BT.to(part.dtype) for part in history if part is not None))


def columns(history: History, pick: slice) -> History:
    return History(*(part[:, pick] for part in history if part is not None))


@WAYS
@torch.no_grad()
def test_nothing_of_a_later_event_reaches_earlier_positions(name: str) -> None:
    network, history = network_of(ENCODERS[name]), history_of()
    for changed in (1, 4, T - 1):
        other = History(*(part.clone() for part in history if part is not None))
        other.item_BT[:, changed] = history.item_BT[:, changed] % N_ITEMS + 1
        assert other.rating_BT is not None
        assert other.event_BT is not None
        assert other.time_BT is not None
        other.rating_BT[:, changed] = 6 - other.rating_BT[:, changed]
        other.event_BT[:, changed] = 1 - other.event_BT[:, changed]
        other.time_BT[:, changed] += 10**7
        before_BTD, after_BTD = network(history), network(other)
        assert torch.equal(before_BTD[:, :changed], after_BTD[:, :changed])
        assert ((before_BTD - after_BTD).abs().amax(dim=-1)[:, changed:] > 1e-5).all()


@WAYS
@torch.no_grad()
def test_padding_changes_nothing(name: str) -> None:
    network, lengths = network_of(ENCODERS[name]), (1, 3, T, 5)
    history = history_of(lengths)
    h_BTD = network(history)
    for row, length in enumerate(lengths):
        alone = columns(history.take(slice(row, row + 1)), slice(T - length, T))
        assert torch.allclose(network(alone)[0], h_BTD[row, T - length :], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "mean"])
def test_packed_and_static_layouts_are_one_network(name: str) -> None:
    encoder = ENCODERS[name]
    assert isinstance(encoder, EncoderConfig)
    packed, static = network_of(encoder), network_of(dataclasses.replace(encoder, packed=False))
    history = history_of((2, 0, 5, 1))
    keep_BT = history.item_BT != 0
    weight_BTD = torch.randn(4, T, 16, generator=torch.Generator().manual_seed(2)) * keep_BT[..., None]
    h_BTD, other_BTD = packed(history), static(history)
    assert torch.allclose(h_BTD[keep_BT], other_BTD[keep_BT], atol=1e-5)
    (h_BTD * weight_BTD).sum().backward()
    (other_BTD * weight_BTD).sum().backward()
    for (parameter_name, one), other in zip(packed.named_parameters(), static.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, parameter_name
        else:
            assert torch.allclose(one.grad, other.grad, atol=1e-4, rtol=1e-3), parameter_name


@WAYS
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    network = network_of(ENCODERS[name]).train()
    h_BTD = network(history_of((T, 3) * 20))
    network.head(h_BTD.flatten(0, 1), network.encoder.items)[:, 1:].logsumexp(dim=-1).sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@WAYS
def test_empty_histories_give_numbers(name: str) -> None:
    assert network_of(ENCODERS[name]).scores(history_of((0, 0)))[:, 1:].isfinite().all()


def test_a_packed_batch_keeps_no_padding_and_is_as_long_as_its_longest_history() -> None:
    history = history_of((2, 5, 0, 1))
    layout = layout_of(history.item_BT, packed=True)
    assert isinstance(layout, Packed)
    x_MX = torch.randn(8, 3)
    assert layout.grid(x_MX).shape == (4, 5, 3)
    assert torch.equal(layout.gather(layout.grid(x_MX)), x_MX)
    assert torch.equal(layout.restore(x_MX)[history.item_BT != 0], x_MX)
    assert layout.cells(history.item_BT)[0].tolist() == [*history.item_BT[0, -2:].tolist(), 0, 0, 0]
    assert type(layout_of(history_of().item_BT, packed=True)) is Layout


def test_gaps_are_from_the_event_to_the_request_in_buckets_of_equal_ratio() -> None:
    day_s, gaps = 86_400, TimeGaps(buckets=30)  # bounds at powers of two, hit up to rounding
    time_BT = torch.tensor([[0, 1, 1 + day_s, 1 + day_s]])
    request_BT = torch.tensor([[1, 1 + day_s, 1 + day_s, 1 + 2 * day_s]])
    bucket_TT = gaps.bucket(time_BT, request_BT)[0]
    for i in range(4):
        for j in range(4):
            gap_s = int(request_BT[0, i] - time_BT[0, j])
            expected = min(29, math.floor(math.log2(max(gap_s, 1)) + 1e-4))
            assert bucket_TT[i, j] == expected, (i, j)
    far = gaps.bucket(torch.tensor([[0]]), torch.tensor([[2**40]]))
    assert far.item() == 29


def test_attention_within_autocast_does_not_round_its_bias() -> None:
    torch.manual_seed(0)
    q_BNLH, k_BNLH, v_BNLH = (torch.randn(3, 2, T, 4, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 2, T, T).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        own = attend(q_BNLH, k_BNLH, v_BNLH, bias)
        assert torch.equal(own, F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, attn_mask=bias))


@pytest.mark.parametrize("users", [1, 3])  # one bias for all, or each their own
def test_attention_with_a_bias_that_learns_is_that_of_torch(users: int) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(3, T, 2, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3)]
    hidden_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
    bias = torch.randn(users, 2, T, T, dtype=torch.float64).masked_fill(hidden_TT, float("-inf")).requires_grad_()
    weight = torch.randn(3, 2, T, 4, dtype=torch.float64)
    own, torchs = attend(*parts, bias), F.scaled_dot_product_attention(*parts, attn_mask=bias)
    assert torch.allclose(own, torchs)
    for one, other in zip(
        *(torch.autograd.grad((a * weight).sum(), [*parts, bias]) for a in (own, torchs)), strict=True
    ):
        assert torch.allclose(one, other)


def test_the_bias_by_time_has_the_gradient_of_a_lookup() -> None:
    torch.manual_seed(0)
    bias, gaps = RelativeBias(2, T, TimeGaps(buckets=16)), TimeGaps(buckets=16)
    history = history_of()
    assert history.time_BT is not None
    assert history.request_BT is not None
    assert bias.time_NG is not None
    torch.nn.init.normal_(bias.time_NG)
    scene = Scene(Layout(history.item_BT), gaps.bucket(history.time_BT, history.request_BT))
    assert scene.bucket_BLL is not None
    plain_BNTT = F.embedding(scene.bucket_BLL.long(), bias.time_NG.t()).permute(0, 3, 1, 2)
    weight_BNTT = torch.randn_like(plain_BNTT)
    own = bias(scene)
    assert torch.allclose(own, plain_BNTT)  # distances are zero
    (own_NG,) = torch.autograd.grad((own * weight_BNTT).sum(), bias.time_NG)
    (plain_NG,) = torch.autograd.grad((plain_BNTT * weight_BNTT).sum(), bias.time_NG)
    assert torch.allclose(own_NG, plain_NG, atol=1e-4)


@torch.no_grad()
def test_times_ratings_and_types_are_read_and_unknown_ones_have_vectors_of_their_own() -> None:
    network, history = network_of(ENCODERS["gated, all inputs"]), history_of()
    before_BI = network.scores(history)
    assert history.request_BT is not None
    assert history.rating_BT is not None
    assert history.event_BT is not None
    for other in (
        history._replace(request_BT=history.request_BT + 10**8),
        history._replace(rating_BT=torch.full_like(history.rating_BT, math.nan)),
        history._replace(event_BT=torch.full_like(history.event_BT, -1)),
    ):
        after_BI = network.scores(other)
        assert after_BI[:, 1:].isfinite().all()
        assert not torch.allclose(before_BI[:, 1:], after_BI[:, 1:], atol=1e-4)


@pytest.mark.parametrize(("key", "part"), [("time", "time_BT"), ("rating", "rating_BT"), ("event", "event_BT")])
def test_a_history_without_what_the_network_reads_is_refused(key: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"encoder.{key} and the history has no {key}s; give them"):
        network_of(ENCODERS["gated, all inputs"]).scores(history_of()._replace(**{part: None}))


def test_a_store_without_what_the_network_reads_is_refused() -> None:
    sequences = Sequences(item_E=np.arange(1, 5, dtype=np.int32), offset_U1=np.array([0, 4]))
    with pytest.raises(ConfigError, match=r"network.encoder.time reads times, and the data set has none"):
        ENCODERS["gated, all inputs"].inputs.check(sequences)
    ENCODERS["gated"].inputs.check(sequences)
    assert Inputs.of(sequences) == Inputs()


def test_evaluation_asks_at_the_time_of_the_answer() -> None:
    sequences = Sequences(
        item_E=np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.int32),
        offset_U1=np.array([0, 4, 7]),
        time_E=np.array([10, 20, 30, 40, 100, 300, 700]),
    )
    history = histories(sequences, split(LeaveOneOut(), sequences).test, 4)
    assert history.item_BT.tolist() == [[0, 1, 2, 3], [0, 0, 5, 6]]
    assert history.time_BT is not None
    assert history.time_BT.tolist() == [[0, 10, 20, 30], [0, 0, 100, 300]]
    assert history.request_BT is not None
    assert history.request_BT.tolist() == [[0, 20, 30, 40], [0, 0, 300, 700]]


# Heads


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig(user_temperature=True), DotHeadConfig()])
def test_scores_are_queries_times_keys(head: AnyHead) -> None:
    network = network_of(ENCODERS["gated"], head)
    if isinstance(head, HeadConfig) and head.user_temperature:
        torch.nn.init.normal_(network.head.get_parameter("user_scale.weight"))
    h_BD = torch.randn(5, 16)
    score_BI = network.head(h_BD, network.encoder.items)
    assert torch.allclose(score_BI, network.head.query(h_BD) @ network.keys().t(), atol=1e-4)
    index_K = torch.tensor([3, 9])
    assert torch.allclose(score_BI[:, index_K], network.head.query(h_BD) @ network.keys(index_K).t(), atol=1e-4)


def test_the_temperature_of_users_moves_scores_and_never_their_order() -> None:
    plain, warm = network_of(ENCODERS["gated"]), network_of(ENCODERS["gated"], HeadConfig(user_temperature=True))
    h_BD = torch.randn(5, 16)
    assert torch.allclose(plain.head.query(h_BD), warm.head.query(h_BD))  # as configured at first
    torch.nn.init.normal_(warm.head.get_parameter("user_scale.weight"))
    ratio_B = warm.head.query(h_BD).norm(dim=-1) / plain.head.query(h_BD).norm(dim=-1)
    assert ((ratio_B > 1 / math.e) & (ratio_B < math.e)).all()
    assert ratio_B.std() > 0.1
    orders = [network.head(h_BD, plain.encoder.items).argsort(dim=1) for network in (plain, warm)]
    assert torch.equal(*orders)


# Configs


@pytest.mark.parametrize("encoder", ENCODERS.values())
@pytest.mark.parametrize("head", [HeadConfig(), DotHeadConfig()])
def test_a_config_comes_back_from_plain_values(encoder: AnyEncoder, head: AnyHead) -> None:
    config = NetworkConfig(encoder=encoder, head=head)
    assert from_mapping(NetworkConfig, to_mapping(config)) == config


def test_a_config_written_before_there_were_alternatives_means_the_same_network() -> None:
    block = {"heads": 4, "expansion": 2.0, "residual_gates": True}
    encoder = {"width": 16, "blocks": 1, "max_length": 6, "dropout": 0.1, "block": block}
    old = {"encoder": encoder, "head": {"temperature": 0.1}, "table": "float32"}
    expected = EncoderConfig(
        width=16, blocks=1, max_length=6, dropout=0.1, block=BlockConfig(heads=4, residual_gates=True)
    )
    assert from_mapping(NetworkConfig, old) == NetworkConfig(encoder=expected, head=HeadConfig(temperature=0.1))


def test_a_mistake_where_the_kind_is_left_out_is_still_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'encoder.widht'; did you mean 'width'\?"):
        from_mapping(NetworkConfig, {"encoder": {"widht": 16}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HSTUBlockConfig(heads=0), "heads >= 1"),
        (lambda: SASRecBlockConfig(expansion=0), "expansion > 0"),
        (lambda: EncoderConfig(width=10, block=SASRecBlockConfig(heads=3)), "width 10 does not divide over 3 heads"),
        (lambda: TimeGaps(buckets=1), "time.buckets 1 must be at least 2"),
        (lambda: RatingInput(lowest=3, highest=3), "lowest < highest"),
        (lambda: EventInput(types=()), "event.types is empty"),
        (lambda: MeanEncoderConfig(width=0), "must be >= 1"),
    ],
)
def test_impossible_parts_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)
