"""However a step is computed, it follows the curve of the plain way: bit for bit, or as closely as rounding lets it."""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from elasticrec.columns import ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.config import from_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.errors import ConfigError
from elasticrec.model.bias import RelativeBias, Scene, TimeGaps
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.layout import layout_of
from elasticrec.model.loss import FullSoftmax, SummedLoss, softmax_gradient, softmax_gradient_in_place
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.compute import ComputeConfig, apply
from elasticrec.training.host import LocalHost
from elasticrec.training.journal import STEPS, read
from elasticrec.training.loop import Loop
from elasticrec.training.run import CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig

N_USERS, N_ITEMS, N_STEPS = 60, 40, 8  # two epochs of four steps; the last of each has 12 users, not 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Users who walk through the items in strides of 1 to 3, with a time for each event."""
    length_U = 4 + np.arange(N_USERS) * 7 % 13
    walks = [(user * 11 + (user % 3 + 1) * np.arange(n)) % N_ITEMS + 1 for user, n in enumerate(length_U)]
    item_E = np.concatenate(walks).astype(np.int32)
    sequences = Sequences(
        item_E=item_E,
        offset_U1=np.concatenate([[0], np.cumsum(length_U)]),
        time_E=np.cumsum(np.arange(len(item_E)) ** 2 % 5_000),
    )
    users = pa.table({USER_INDEX: np.arange(N_USERS), USER: [f"u{user}" for user in range(N_USERS)]})
    items = pa.table({ITEM_INDEX: np.arange(1, N_ITEMS + 1), ITEM: [f"i{item}" for item in range(N_ITEMS)]})
    return write_store(tmp_path_factory.mktemp("compute") / "store", sequences, users, items, command="test")


def curve(store: Store, storage: Path, compute: ComputeConfig, dropout: float, fused: bool = False) -> list[float]:
    encoder = EncoderConfig(
        width=16,
        blocks=1,
        max_length=8,
        dropout=dropout,
        packed=compute.bucket_tokens > 0,
        time=TimeGaps(buckets=8),
    )
    run = RunConfig(
        storage=storage,
        epochs=2,
        network=NetworkConfig(encoder=encoder),
        loss=FullSoftmax(fused=fused),
        plan=PlanConfig(batch_users=16, shards=4),
        validation=ValidationConfig(every_epochs=2),
        checkpoint=CheckpointConfig(interval_s=1e6),
        compute=compute,
        elastic=ElasticConfig(max_workers=1, gpus_per_worker=float(compute.graphs or compute.capture)),
    )
    Loop(run, store, LocalHost(run.folder)).train()
    losses = [line["loss"] for line in read(run.folder / STEPS)]
    assert len(losses) == N_STEPS
    return losses


@pytest.fixture(scope="module")
def expected(store: Store, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of the plain way without dropout."""
    return curve(store, tmp_path_factory.mktemp("plain"), ComputeConfig(), dropout=0.0)


@pytest.mark.parametrize(
    "compute",
    [ComputeConfig(ahead=2), ComputeConfig(recompute="blocks"), ComputeConfig(recompute="elementwise")],
    ids=["ahead", "blocks again", "elementwise again"],
)
def test_what_changes_no_number_gives_the_same_bits(store: Store, tmp_path: Path, compute: ComputeConfig) -> None:
    plain = curve(store, tmp_path / "plain", ComputeConfig(), dropout=0.2)
    assert curve(store, tmp_path / "changed", compute, dropout=0.2) == plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_the_compiled_network_and_loss_follow_the_curve(
    store: Store, tmp_path: Path, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured and differentiated as on a GPU; kernels are not made, since a C++ compiler takes minutes for them."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("elasticrec.model.unit._compiled", functools.cache(torch.compile))
    compiled = curve(store, tmp_path / "compiled", ComputeConfig(compile=True), dropout=0.0, fused=True)
    assert compiled == pytest.approx(expected, rel=1e-5)


def test_bfloat16_products_follow_the_curve(
    store: Store, tmp_path: Path, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elasticrec.training.compute.multiplies_bfloat16", lambda: True)  # or slowly
    rounded = curve(store, tmp_path / "rounded", ComputeConfig(precision="bfloat16"), dropout=0.0)
    assert rounded != expected
    assert rounded == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("loss", [FullSoftmax(), FullSoftmax(label_smoothing=0.1), FullSoftmax(mask_seen=True)])
def test_tokens_filled_up_to_a_few_numbers_follow_the_curve(store: Store, tmp_path: Path, loss: FullSoftmax) -> None:
    """What is filled up belongs to nobody: it is not attended to, and has neither loss nor gradient."""
    curves = []
    for name, compute in (("packed", ComputeConfig()), ("filled", ComputeConfig(bucket_tokens=64, ahead=1))):
        encoder = EncoderConfig(width=16, blocks=1, max_length=8, dropout=0.0, time=TimeGaps(buckets=8))
        run = RunConfig(
            storage=tmp_path / name,
            epochs=2,
            network=NetworkConfig(encoder=encoder),
            loss=loss,
            plan=PlanConfig(batch_users=16, shards=4),
            validation=ValidationConfig(every_epochs=2),
            checkpoint=CheckpointConfig(interval_s=1e6),
            compute=compute,
        )
        Loop(run, store, LocalHost(run.folder)).train()
        curves.append([line["loss"] for line in read(run.folder / STEPS)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_filled_up_tokens_keep_their_places_on_a_grid() -> None:
    item_BT = torch.tensor([[0, 0, 3, 4], [0, 0, 0, 0], [5, 6, 7, 8]])
    place_M = torch.tensor([2, 3, 8, 9, 10, 11, 12, 12])
    layout = layout_of(item_BT, True, place_M)
    assert layout.tokens(item_BT).tolist() == [3, 4, 5, 6, 7, 8, 0, 0]
    assert layout.cells(item_BT).tolist() == [[3, 4, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8]]
    assert layout.offset_B1 is not None
    assert layout.offset_B1.tolist() == [0, 2, 2, 6]
    x_MX = torch.arange(1.0, 17.0).view(8, 2)
    assert torch.equal(layout.gather(layout.grid(x_MX))[:6], x_MX[:6])
    assert not layout.gather(layout.grid(x_MX))[6:].any()


def test_a_capture_without_a_gpu_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute\.capture needs a GPU, this worker has 'cpu'"):
        curve(store, tmp_path, ComputeConfig(capture=True, bucket_tokens=64), dropout=0.0)


def test_a_graph_without_a_gpu_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute\.graphs needs a GPU, this worker has 'cpu'"):
        curve(store, tmp_path, ComputeConfig(compile=True, graphs=True), dropout=0.0)


@pytest.mark.parametrize(
    "raw",
    [
        {"network": {"encoder": {"width": 96, "block": {"attention": "jagged"}}}},  # a CPU computes it by sdpa
        {
            "network": {"encoder": {"width": 96, "time": {}, "block": {"attention": "jagged"}}},  # sdpa, too
            "elastic": {"gpus_per_worker": 1},
        },
        {
            "network": {"encoder": {"width": 96, "block": {"heads": 3, "attention": "jagged"}}},
            "elastic": {"gpus_per_worker": 1},
        },
        {
            "elastic": {"max_workers": 1, "gpus_per_worker": 0.5},
            "compute": {"capture": True, "bucket_tokens": 1024},
        },
    ],
)
def test_a_run_that_its_workers_can_compute_is_taken(raw: dict[str, Any]) -> None:
    from_mapping(RunConfig, raw)


def test_the_softmax_for_compilers_is_the_one_in_place() -> None:
    logits_mI, target_m1 = torch.randn(7, 11) * 30, torch.randint(0, 11, (7, 1))
    target_m1[3] = -1  # left out
    loss, grad_mI = softmax_gradient(logits_mI, target_m1, torch.float32)
    expected, expected_mI = softmax_gradient_in_place(logits_mI.clone(), target_m1, torch.float32)
    assert not grad_mI[3].any()
    assert loss == pytest.approx(F.cross_entropy(logits_mI, target_m1[:, 0], reduction="sum", ignore_index=-1).item())
    torch.testing.assert_close((loss, grad_mI), (expected, expected_mI))


@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_is_the_attention_with_a_written_bias(packed: bool) -> None:
    """Its backward pass needs a GPU."""
    from torch.nn.attention.flex_attention import flex_attention as plain

    from elasticrec.model.flex import flex_attention_by

    item_BT, time_BT = torch.randint(1, 9, (3, 10)), torch.randint(0, 10**6, (3, 10)).sort(dim=1).values
    item_BT[0, :4], item_BT[1, :2] = 0, 0
    bias, layout = RelativeBias(2, 10, TimeGaps()), layout_of(item_BT, packed)
    for parameter in bias.parameters():
        torch.nn.init.normal_(parameter)
    cells_BL = layout.cells(time_BT)
    scene = Scene(layout, TimeGaps().bucket(cells_BL, cells_BL + 5))
    q_BNLH, k_BNLH, v_BNLH = torch.randn(3, 3, 2, layout.length, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow without a compiler
        own = flex_attention_by(plain, q_BNLH, k_BNLH, v_BNLH, bias, scene)
        expected = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH, attn_mask=bias.masked(scene))
    token_BL = layout.cells(item_BT) != 0
    mask_BNLH = token_BL[:, None, :, None]
    torch.testing.assert_close(own * mask_BNLH, expected * mask_BNLH)


def test_the_time_gradient_for_devices_is_the_one_counted_on_the_host() -> None:
    from elasticrec.model.bias import _counted_by_row, _Lookup

    weight_NG, bucket_BLL = torch.randn(2, 6, requires_grad=True), torch.randint(0, 6, (3, 5, 5), dtype=torch.int32)
    grad_BNLL = torch.randn(3, 2, 5, 5)
    _Lookup.apply(weight_NG, bucket_BLL).backward(grad_BNLL)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(_counted_by_row(grad_BNLL, bucket_BLL, 6), weight_NG.grad)


def test_averaged_weights_leave_the_trained_ones_where_they_were(store: Store, tmp_path: Path) -> None:
    """A captured graph reads parameters by their address."""
    run = RunConfig(storage=tmp_path, plan=PlanConfig(batch_users=16, shards=4))
    loop = Loop(run, store, LocalHost(run.folder))
    before = [parameter.data_ptr() for parameter in loop.network.parameters()]
    with loop.averaged.worn_by(loop.network):
        assert [parameter.data_ptr() for parameter in loop.network.parameters()] != before
    assert [parameter.data_ptr() for parameter in loop.network.parameters()] == before


@pytest.mark.parametrize(
    ("able", "precision", "warned"), [(False, "bfloat16", 1), (True, "bfloat16", 0), (False, "float32", 0)]
)
def test_a_cpu_that_cannot_multiply_bfloat16_says_so_and_does_not(
    able: bool, precision: str, warned: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("elasticrec.training.compute.multiplies_bfloat16", lambda: able)
    config = ComputeConfig(precision=precision)  # type: ignore[arg-type]
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=4)), 5)
    loss = SummedLoss(network, FullSoftmax())
    with caplog.at_level("WARNING", logger="elasticrec.training.compute"):
        apply(config, loss, torch.device("cpu"))
    assert sum("no instructions for bfloat16" in record.message for record in caplog.records) == warned
    assert (loss.products == torch.bfloat16) == (able and precision == "bfloat16")
