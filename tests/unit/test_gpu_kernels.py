"""Kernels of Triton give what torch gives, rounded layers and graphs what a CPU gives. On a GPU alone.

`benchmarks.gpu_training --check` tests the kernels in training.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.compression.linears import BFloat16Linear, Fp8Linear, Int4Linear, Int8Linear, SparseLinear
from elasticrec.compression.quantize import BFloat16Table, Int8Table
from elasticrec.compression.recipe import Layers, Step
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.data.split import LeaveOneOut
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model import loss
from elasticrec.model.answer import AnswerConfig, Answerer
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.loss import softmax_gradient
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.topk import GroupedTopK, Keys

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HEADS, WIDTH, LONGEST = 2, 32, 150
OFFSETS = [0, 3, 3, 133, 200]  # of four users, one of whom has no token; ten tokens belong to nobody
TOKENS = 210


def by_torch(qkv_M3A: Tensor, weight_NT: Tensor) -> Tensor:
    out = []
    for begin, end in itertools.pairwise(OFFSETS):
        length = end - begin
        q, k, v = (part.view(length, HEADS, WIDTH).transpose(0, 1) for part in qkv_M3A[begin:end].chunk(3, dim=1))
        distance_LL = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        bias_NLL = weight_NT[:, distance_LL.clamp(min=0)].masked_fill(distance_LL < 0, float("-inf"))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias_NLL).transpose(0, 1).flatten(1))
    return torch.cat([*out, qkv_M3A.new_zeros(TOKENS - OFFSETS[-1], HEADS * WIDTH)])


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_without_a_grid(dtype: torch.dtype, near: float) -> None:
    from elasticrec.model.jagged import jagged_attention

    wide_M4A = torch.randn(TOKENS, 4 * HEADS * WIDTH, device="cuda").to(dtype)
    weight_NT, grad_MA = torch.randn(HEADS, LONGEST, device="cuda"), torch.randn(TOKENS, HEADS * WIDTH, device="cuda")
    offset_B1 = torch.tensor(OFFSETS, device="cuda")
    found = []
    for kind, attend in (
        (torch.float64, by_torch),
        (dtype, lambda qkv, weight: jagged_attention(qkv, weight, offset_B1, LONGEST)),
    ):
        qkv = wide_M4A.to(kind).requires_grad_()
        weight = weight_NT.to(torch.float64 if kind == torch.float64 else torch.float32).requires_grad_()
        out = attend(qkv[:, : 3 * HEADS * WIDTH], weight)
        out.backward(grad_MA.to(out.dtype))
        found.append((out.detach(), qkv.grad, weight.grad))
    for expected, own in zip(*found, strict=True):
        assert expected is not None
        assert own is not None
        assert (own.double() - expected).norm() < near * expected.norm()


@pytest.mark.parametrize("items", [1_000, 27_000, 60_000])  # few warps and many
@pytest.mark.parametrize(("products", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_softmax_in_one_pass(products: torch.dtype, near: float, items: int) -> None:
    from elasticrec.model import softmax_triton

    logits_mI = (torch.randn(65, items, device="cuda") * 5).to(products)
    target_m1 = torch.randint(0, items, (65, 1), device="cuda")
    target_m1[7] = -1
    expected = softmax_gradient(logits_mI.double(), target_m1, torch.float64)
    own = softmax_triton.softmax_gradient_in_place(logits_mI, target_m1, products)
    assert own[1].data_ptr() == logits_mI.data_ptr()
    torch.testing.assert_close(own[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(own[1].double() / loss.gradient_scale(products), expected[1], rtol=near, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [2**21, 2**29])  # several chunks and one
@pytest.mark.parametrize("scale", [20, 100])  # at the start, and where a temperature may fall to
def test_a_fused_loss_with_narrow_logits(monkeypatch: pytest.MonkeyPatch, scale: int, chunk_bytes: int) -> None:
    """Queries near their answers among items near each other, as after training: large logits decide there."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cuda", chunk_bytes)
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    item_ID = F.normalize(noise(50, 64).repeat_interleave(101, 0)[:5_003] + 0.5 * noise(5_003, 64), dim=1)
    target_M = torch.randint(0, 5_003, (700,), device="cuda", generator=generator)
    query_MD = F.normalize(item_ID[target_M] + 0.1 * noise(700, 64), dim=1) * scale
    target_M[-9:] = -1
    found = []
    for fused in (False, True):
        query, item = query_MD.clone().requires_grad_(), item_ID.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=fused):
            total = loss.summed_cross_entropy(query, item, target_M, fused=fused)
        total.backward()
        assert query.grad is not None
        assert item.grad is not None
        assert not query.grad[-9:].any()
        found.append((total.detach(), query.grad, item.grad))
    for expected, own in zip(*found, strict=True):
        assert (own - expected).norm() < 2e-4 * scale * expected.norm()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("queries", [1, 130])
def test_the_best_of_a_catalogue(integers: bool, queries: int) -> None:
    key_ID = torch.randint(-127, 128, (5003, 64), device="cuda")
    keys = Keys(key_ID=key_ID.to(torch.int8 if integers else torch.bfloat16), scale_I=torch.rand(5003, device="cuda"))
    query_BD = torch.randn(queries, 64, device="cuda").to(torch.bfloat16)
    score_BI = query_BD.double() @ keys.key_ID.double().t() * keys.scale_I
    score_BI[:, 0] = float("-inf")
    row_N = torch.arange(queries).repeat_interleave(9)
    item_N = score_BI.topk(9).indices.flatten().cpu()
    score_BI[row_N, item_N] = float("-inf")
    item_BK, score_BK = GroupedTopK(keys).top(query_BD, 50, row_N, item_N)
    torch.testing.assert_close(score_BK.double(), score_BI.topk(50).values, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(score_BK.double(), score_BI.gather(1, item_BK), rtol=1e-4, atol=1e-3)


LAYERS = [BFloat16Linear(), Int8Linear(), Int8Linear(activations="none"), Fp8Linear(), Int4Linear(), SparseLinear()]


def network_of(*steps: Step, attention: str = "sdpa") -> Network:
    torch.manual_seed(0)
    block = BlockConfig(heads=2, attention=attention)  # type: ignore[arg-type]
    encoder = EncoderConfig(width=128, blocks=2, max_length=40, block=block)
    network = Network(NetworkConfig(encoder=encoder), 5000).eval().requires_grad_(False)
    bench = Workbench(
        teacher=network,
        store=None,  # type: ignore[arg-type]  # these steps need no data
        split=LeaveOneOut(),
        evaluation=EvaluationConfig(),
        scratch=Path(),
        device="cuda",
    )
    for step in steps:
        network = apply(step, network, bench)
    return network


def history_of(users: int) -> History:
    generator = torch.Generator().manual_seed(users)
    item_BT = torch.randint(1, 5001, (users, 40), generator=generator)
    length_B1 = torch.randint(1, 41, (users, 1), generator=generator)
    return History(item_BT.masked_fill(torch.arange(40) < 40 - length_B1, 0))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("step", LAYERS, ids=lambda step: f"{step.kind}-{getattr(step, 'activations', '')}")
@pytest.mark.parametrize("users", [1, 3, 40])
def test_layers_are_near_those_of_a_cpu(step: Layers, autocast: bool, users: int) -> None:
    """The same numbers are multiplied; what differs is the order of sums, and bfloat16 in between."""
    network, history = network_of(step), history_of(users)
    expected_BD = network.newest(history)
    network = network.to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        own_BD = network.newest(history.to("cuda")).float().cpu()
    assert torch.cosine_similarity(own_BD, expected_BD).min() > 0.99


@pytest.mark.parametrize("attention", ["sdpa", "jagged"])
@pytest.mark.parametrize("step", LAYERS, ids=lambda step: f"{step.kind}-{getattr(step, 'activations', '')}")
def test_graphs_answer_as_launched_kernels(step: Layers, attention: str) -> None:
    network = network_of(Int8Table(), step, attention=attention).to("cuda")
    config = AnswerConfig(k=50, batches=(1, 16))
    if isinstance(step, SparseLinear):
        with pytest.raises(ConfigError, match="leave capture out"):
            Answerer(network, replace(config, capture=True))
        return
    launched, captured = Answerer(network, config), Answerer(network, replace(config, capture=True))
    for users in (1, 5, 16, 5, 1):
        item_BK, score_BK = launched.answer(history_of(users))
        own_item_BK, own_score_BK = captured.answer(history_of(users))
        assert own_item_BK.shape == (users, 50)
        # A filled-up batch may be multiplied by another kernel, which sums in another order.
        torch.testing.assert_close(own_score_BK, score_BK, rtol=0.02, atol=0.02)
        assert (own_item_BK[:, :, None] == item_BK[:, None]).any(dim=2).float().mean() > 0.9


def test_answers_are_the_best_of_all_scores() -> None:
    history = history_of(20)
    answerer = Answerer(network_of(BFloat16Table(), BFloat16Linear()).to("cuda"), AnswerConfig(k=50))
    item_BK, score_BK = answerer.answer(history)
    score_BI = answerer.scores(history).clone()
    score_BI.scatter_(1, history.item_BT.cuda(), float("-inf"))
    torch.testing.assert_close(score_BK, score_BI.topk(50).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(score_BK, score_BI.gather(1, item_BK), rtol=1e-3, atol=1e-3)
