"""Layers in fp8, int4 and 2:4: what they compute, to the letter and near the layer they stand for; where they refuse.

# M tokens, D inputs, O outputs
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elasticrec.compression.linears import BFloat16Linear as BFloat16Step
from elasticrec.compression.linears import Fp8Linear as Fp8Step
from elasticrec.compression.linears import Int4Linear as Int4Step
from elasticrec.compression.linears import Int8Linear as Int8Step
from elasticrec.compression.linears import SparseLinear as SparseStep
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.data.split import LeaveOneOut
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model import linear, narrow
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.linear import LinearPrecision, set_linears
from elasticrec.model.narrow import FP8, GROUP, Fp8Linear, Int4Linear, check_fp8, fp8_rows, int4_groups
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sparse import Sparse24Linear, check_sparse, two_of_four


def bench(width: int = 64) -> Workbench:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=width, blocks=2, max_length=8)
    return Workbench(
        teacher=Network(NetworkConfig(encoder=encoder), 50).eval().requires_grad_(False),
        store=None,  # type: ignore[arg-type]  # these steps need no data
        split=LeaveOneOut(),
        evaluation=EvaluationConfig(),
        scratch=Path(),
    )


def test_fp8_is_the_product_of_what_was_rounded() -> None:
    torch.manual_seed(0)
    weight_OD, x_MD, bias_O = torch.randn(16, 48), torch.randn(5, 48), torch.randn(16)
    layer = Fp8Linear(48, 16, bias=True)
    rounded_OD, step_O1 = fp8_rows(weight_OD)
    layer.load_state_dict({"weight_OD": rounded_OD.view(torch.uint8), "scale_O": step_O1[:, 0], "bias_O": bias_O})
    rounded_MD, step_M1 = fp8_rows(x_MD)
    expected_MO = (rounded_MD.double() * step_M1) @ (rounded_OD.double() * step_O1).t() + bias_O
    torch.testing.assert_close(layer(x_MD).double(), expected_MO, rtol=1e-5, atol=1e-5)
    exact_MO = x_MD @ weight_OD.t() + bias_O
    assert (layer(x_MD) - exact_MO).square().mean() < 0.01 * exact_MO.square().mean()
    assert torch.equal(layer(x_MD[None]), layer(x_MD)[None])


def test_fp8_keeps_the_largest_entry_and_zeros() -> None:
    rounded_MD, step_M1 = fp8_rows(torch.tensor([[1.0, -3.0, 0.5], [0.0, 0.0, 0.0]]))
    assert rounded_MD.dtype == FP8
    assert (rounded_MD.float() * step_M1)[0, 1] == pytest.approx(-3.0)
    assert not rounded_MD[1].float().any()


@pytest.mark.parametrize("inputs", [GROUP, 3 * GROUP, GROUP + 5])
def test_int4_weights_are_off_by_half_a_step_at_most(inputs: int) -> None:
    torch.manual_seed(0)
    weight_OD = torch.randn(8, inputs) * torch.logspace(-2, 2, 8)[:, None]
    layer = Int4Linear(inputs, 8, bias=False)
    layer.load_state_dict(int4_groups(weight_OD))
    step_OD = layer.get_buffer("scale_OG").float().repeat_interleave(GROUP, dim=1)[:, :inputs]
    inside_OD = weight_OD.abs() <= 7.5 * step_OD  # what is beyond was cut off for the sake of the others
    assert inside_OD.float().mean() > 0.9
    assert bool(((layer.weight() - weight_OD).abs()[inside_OD] <= 0.5001 * step_OD[inside_OD]).all())
    x_MD = torch.randn(3, inputs)
    torch.testing.assert_close(layer(x_MD), x_MD @ layer.weight().t())


def test_the_scale_of_a_group_is_better_than_that_of_its_largest_entry() -> None:
    weight_OD = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(0))
    layer = Int4Linear(GROUP, 64, bias=False)
    layer.load_state_dict(int4_groups(weight_OD))
    step_O1 = weight_OD.abs().amax(dim=1, keepdim=True) / 7
    plain_OD = (weight_OD / step_O1).round().clamp(-8, 7) * step_O1
    assert (layer.weight() - weight_OD).square().sum() < 0.95 * (plain_OD - weight_OD).square().sum()


@pytest.mark.parametrize(
    ("step", "bytes_a_weight", "near"),
    [(BFloat16Step(), 2.0, 0.999), (Fp8Step(), 1.0, 0.99), (Int4Step(), 0.5, 0.95), (SparseStep(), 1.0, 0.25)],
)
def test_networks_of_such_layers_are_small_and_near(
    step: BFloat16Step | Fp8Step | Int4Step | SparseStep, bytes_a_weight: float, near: float
) -> None:
    given = bench()
    made = apply(step, given.teacher, given)
    before = sum(
        p.numel() for n, p in given.teacher.encoder.blocks.named_parameters() if n.endswith("weight") and p.ndim == 2
    )
    held = sum(
        t.nbytes for n, t in made.encoder.blocks.named_buffers() if n.endswith(("weight_OD", "packed_OH", "kept_OH"))
    )
    assert held == bytes_a_weight * before
    history = History(torch.randint(1, 51, (20, 8), generator=torch.Generator().manual_seed(0)))
    h_BD, expected_BD = made(history)[:, -1], given.teacher(history)[:, -1]
    assert near < torch.cosine_similarity(h_BD, expected_BD).mean() < 1 - 1e-7


def test_mistakes_are_told() -> None:
    odd = bench(width=24)
    with pytest.raises(ConfigError, match="fp8_linear needs layers of a multiple of 16"):
        apply(Fp8Step(), odd.teacher, odd)
    given = bench()
    with pytest.raises(ConfigError, match="in int4_weights already"):
        apply(Int8Step(), apply(Int4Step(), given.teacher, given), given)
    narrow = bench(width=32)
    with pytest.raises(ConfigError, match="sparse_linear needs layers of a multiple of 64 inputs and 32 outputs"):
        apply(SparseStep(), narrow.teacher, narrow)
    for step in (Fp8Step(), SparseStep()):
        with pytest.raises(ConfigError, match="not on 'mps'"):
            apply(step, given.teacher, replace(given, device="mps"))


def test_two_of_each_four_weights_stay_where_they_were() -> None:
    weight_OD = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.0, 0.5, 0.0]])
    layer = Sparse24Linear(8, 1, bias=True)
    layer.load_state_dict(two_of_four(weight_OD) | {"bias_O": torch.tensor([7.0])})
    assert layer.weight().tolist()[0][:4] == [0.0, -4.0, 0.0, 3.0]
    assert layer.weight().tolist()[0][6] == 0.5
    assert layer(torch.ones(2, 8)).tolist() == [[6.5], [6.5]]


def test_what_is_left_out_is_never_larger_than_what_stays() -> None:
    weight_OD = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    layer = Sparse24Linear(64, 16, bias=False)
    layer.load_state_dict(two_of_four(weight_OD))
    kept_OQ4 = layer.weight().unflatten(1, (-1, 4)) != 0
    assert bool((kept_OQ4.sum(dim=-1) == 2).all())
    size_OQ4 = weight_OD.abs().unflatten(1, (-1, 4))
    least_O = size_OQ4.masked_fill(~kept_OQ4, float("inf")).amin(dim=-1)
    assert bool((size_OQ4.masked_fill(kept_OQ4, 0.0).amax(dim=-1) <= least_O).all())


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int8_weights", "int8_stored", "int4_weights", "fp8"])
def test_what_a_gpu_is_asked_has_shapes_that_its_products_take(
    kind: LinearPrecision, wanted: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tensors without numbers, whose device is said to be a GPU: torch's own checks of each product."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    for module in (narrow, linear):
        monkeypatch.setattr(module, "result_type", lambda _x: wanted)
    with FakeTensorMode(), torch.device("cuda"):
        parent = torch.nn.Sequential(torch.nn.Linear(96, 160, device="meta"))
        set_linears(parent, kind)
        y_MO = parent(torch.empty(tokens, 96))
    assert (y_MO.shape, y_MO.dtype, y_MO.device.type) == ((tokens, 160), wanted, "cuda")


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    with pytest.raises(ConfigError, match=r"capability 8\.9 or more and this one has 7\.5; compress to int8_linear"):
        check_fp8(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"capability 8\.0 or more and this one has 7\.5; prune channels instead"):
        check_sparse(torch.device("cuda"))
