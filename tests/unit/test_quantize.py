"""Smaller item tables: right, really smaller, and the same in a fresh process."""

import copy
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.compression.factorise import LowRankTable
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig, measure, question, resident_bytes
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table, PQTable, int8_rows
from elasticrec.compression.recipe import Recipe, described, label
from elasticrec.compression.workbench import apply
from elasticrec.errors import ConfigError
from elasticrec.model import integers, linear
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.int4 import packed
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.quantized import FloatTable
from elasticrec.model.quantized import Int8Table as Int8Rows
from elasticrec.model.tables import make_table

N_ITEMS = 500
INT4, PQ = Int4Table(keep="rows"), PQTable(iterations=2)
RECIPES: list[Recipe] = [
    (),
    (BFloat16Table(),),
    (Int8Table(),),
    (INT4,),
    (PQ,),
    (LowRankTable(rank=16, keep="rows"),),
    (LowRankTable(rank=16, keep="rows"), Int8Table()),
    (Int8Linear(),),
    (Int8Linear(activations="none"), INT4),
]
LARGEST_COSINE_ERROR = {"float32": 1e-6, "bfloat16_table": 4e-3, "int8_table": 1.5e-2}
NEAR: list[Recipe] = [(), (BFloat16Table(),), (Int8Table(),)]


def compress(recipe: Recipe, network: Network) -> Network:
    """Steps that need nothing but the network."""
    for step in recipe:
        network = apply(step, network, None)  # type: ignore[arg-type]
    return network


def _network(width: int = 64) -> Network:
    torch.manual_seed(0)
    return Network(NetworkConfig(encoder=EncoderConfig(width=width, max_length=8)), N_ITEMS).eval()


@pytest.fixture(scope="module")
def history_BT() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    item_BT = torch.randint(1, N_ITEMS + 1, (33, 8), generator=generator, dtype=torch.int32)
    item_BT[0, :5] = 0
    return item_BT


SCORE_ELSEWHERE = """
import sys, torch
from elasticrec.artifact.bundle import open_bundle
from elasticrec.model.history import History
history = History(torch.load("history.pt"))
for folder in sys.argv[1:]:
    torch.save(open_bundle(folder).network().scores(history), folder + ".pt")
"""


def test_compress_save_load_elsewhere_scores_the_same(tmp_path: Path, history_BT: Tensor) -> None:
    ids = [str(i) for i in range(N_ITEMS)]
    items = pa.table(
        {
            "item_index": pa.array(range(1, N_ITEMS + 1), pa.int32()),
            "item_id": ids,
            "title": ids,
            "categories": [["x"]] * N_ITEMS,
            "count": [1] * N_ITEMS,
        }
    )
    networks = {label(recipe): compress(recipe, _network()) for recipe in RECIPES}
    for recipe in RECIPES:
        name = label(recipe)
        write_bundle(tmp_path / name, networks[name], items, name="m", version="1", recipe=described(recipe))
        assert open_bundle(tmp_path / name).manifest.recipe == described(recipe)
    torch.save(history_BT, tmp_path / "history.pt")
    subprocess.run([sys.executable, "-c", SCORE_ELSEWHERE, *networks], check=True, timeout=120, cwd=tmp_path)
    for name, network in networks.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), network.scores(History(history_BT))), name


@pytest.mark.parametrize("recipe", NEAR, ids=label)
@pytest.mark.parametrize("width", [2, 10, 64, 100, 128])
def test_scores_stay_near_the_teachers(recipe: Recipe, width: int, history_BT: Tensor) -> None:
    teacher = _network(width)
    score_BI = compress(recipe, teacher).scores(History(history_BT))[:, 1:]
    scale = teacher.head.log_scale.exp()
    error = ((score_BI - teacher.scores(History(history_BT))[:, 1:]) / scale).abs().max()
    wider = 1 if not recipe else 8 / width**0.5 + 1  # few entries a row average out less
    assert error < LARGEST_COSINE_ERROR[label(recipe)] * wider


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_cosine_is_the_query_times_the_directions(
    precision: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over more rows than one chunk, on a CPU with and without int8 products."""
    monkeypatch.setattr(integers, "multiplies_int8", lambda _: native)
    generator = torch.Generator().manual_seed(3)
    row_ID = torch.randn(9001, 48, generator=generator)
    row_ID[0] = 0
    weight_ID, scale_I = int8_rows(row_ID)
    states = {
        "float32": {"weight_ID": row_ID},
        "bfloat16": {"weight_ID": row_ID.bfloat16()},
        "int8": {"weight_ID": weight_ID, "scale_I": scale_I},
        "int4": {"packed_HD": packed(weight_ID // 16), "scale_I": scale_I.bfloat16()},
    }
    table = make_table(precision, 9001, 48).requires_grad_(False)
    table.load_state_dict(states[precision])
    query_BD = F.normalize(torch.randn(5, 48, generator=generator), dim=-1)
    want_BI = query_BD @ table.directions().t()
    allowed = 5e-3 if native and precision in ("int8", "int4") else 1e-6
    assert (table.cosine(query_BD) - want_BI).abs().max() < allowed
    assert (table.cosine(20 * query_BD) - 20 * want_BI).abs().max() < 25 * allowed
    assert table.cosine(query_BD)[:, 0].abs().max() == 0


@pytest.mark.parametrize("width", [1, 2, 7, 8, 10, 16, 63, 64, 128])
def test_int8_products_are_exact_integers_at_every_batch(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    table = Int8Rows(77, width)
    integers_ID = torch.randint(-127, 128, (77, width), generator=generator)
    integers_ID[:, 0] = 127  # no row of zeros
    table.load_state_dict({"weight_ID": integers_ID.to(torch.int8), "scale_I": torch.ones(77)})
    query_BD = torch.randint(-127, 128, (32, width), generator=generator)
    query_BD[:, 0] = 127  # the largest entry, so that rounding the query changes nothing
    length_I = integers_ID.double().norm(dim=1)
    want_BI = (query_BD.double() @ integers_ID.double().t() / length_I).float()
    for batch in (1, 2, 32):
        got_BI = table.cosine(query_BD[:batch].float())
        torch.testing.assert_close(got_BI, want_BI[:batch], rtol=1e-5, atol=1e-3)


def test_int8_rows_are_off_by_at_most_half_a_step() -> None:
    row_ID = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    row_ID[7] = 0
    weight_ID, scale_I = int8_rows(row_ID)
    assert weight_ID.dtype == torch.int8
    assert weight_ID.abs().max() == 127
    assert scale_I[7] == 0
    assert ((weight_ID * scale_I[:, None] - row_ID).abs() <= scale_I[:, None] * 0.5001).all()


@pytest.mark.parametrize(
    ("recipe", "share"),
    [((BFloat16Table(),), 0.53), ((Int8Table(),), 0.30), ((INT4,), 0.15)],
    ids=["bf16", "int8", "int4"],
)
def test_tables_are_smaller_on_disk_and_in_memory_also_after_use(
    recipe: Recipe, share: float, history_BT: Tensor
) -> None:
    teacher = _network()
    student = compress(recipe, teacher)
    state = student.encoder.items.state_dict()
    table_bytes = teacher.encoder.items.weight_ID.nbytes
    assert sum(tensor.nbytes for tensor in state.values()) <= share * table_bytes
    student.scores(History(history_BT))
    saved = resident_bytes(teacher) - resident_bytes(student)
    assert saved >= (1 - share - 0.02) * table_bytes  # 0.02: the inverse length of each row
    assert student.encoder.items.cached_bytes() == 4 * (N_ITEMS + 1)


def test_int8_layers_kept_in_float32_are_as_small_a_file_and_answer_alike(history_BT: Tensor) -> None:
    in_int8 = compress((Int8Linear(activations="none"),), _network())
    in_float32 = compress((Int8Linear(activations="none", memory="float32"),), _network())
    assert in_float32.config.linear == "int8_stored"
    torch.testing.assert_close(in_float32.scores(History(history_BT)), in_int8.scores(History(history_BT)))
    assert all(torch.equal(in_int8.state_dict()[name], tensor) for name, tensor in in_float32.state_dict().items())
    layers = [layer for layer in in_float32.modules() if isinstance(layer, linear.Int8Linear)]
    weights = sum(layer.get_buffer("weight_OD").numel() for layer in layers)
    assert resident_bytes(in_float32) - resident_bytes(in_int8) == 4 * weights


def test_int8_rows_kept_in_float32_are_as_small_a_file_and_answer_as_floats_do(history_BT: Tensor) -> None:
    in_int8, in_float32 = (compress((Int8Table(memory=memory),), _network()) for memory in ("int8", "float32"))
    assert in_float32.config.table == "int8_stored"
    assert all(torch.equal(in_int8.state_dict()[name], tensor) for name, tensor in in_float32.state_dict().items())
    with integers.as_elsewhere():
        wanted_BI = in_int8.scores(History(history_BT))
    torch.testing.assert_close(in_float32.scores(History(history_BT)), wanted_BI)
    items = in_float32.encoder.items
    assert not items.rounds_queries
    assert items.cached_bytes() == 4 * (N_ITEMS + 1) * (items.width + 1)  # and the inverse length of each row
    narrow = compress((LowRankTable(rank=8, keep="rows"), Int8Table(memory="float32")), _network())
    narrow.scores(History(history_BT))
    assert narrow.encoder.items.cached_bytes() >= 4 * 8 * (N_ITEMS + 1)
    state = {name: torch.zeros_like(tensor) for name, tensor in items.state_dict().items()}
    items.load_state_dict(state)
    assert not items.dot(torch.ones(1, items.width)).any()


def test_weights_that_change_are_unpacked_again() -> None:
    layer = linear.Int8Linear(2, 1, bias=False, unpacks=True)
    layer.load_state_dict({"weight_OD": torch.tensor([[1, 2]], dtype=torch.int8), "scale_O": torch.tensor([0.5])})
    assert layer(torch.ones(1, 2)).tolist() == [[1.5]]
    layer.load_state_dict({"weight_OD": torch.tensor([[3, 3]], dtype=torch.int8), "scale_O": torch.tensor([0.5])})
    assert layer(torch.ones(1, 2)).tolist() == [[3.0]]
    with pytest.raises(ConfigError, match="set activations to 'none'"):
        Int8Linear(memory="float32")


def test_the_teacher_stays_as_it_is(history_BT: Tensor) -> None:
    teacher = _network()
    before = copy.deepcopy(teacher.state_dict())
    compress((Int8Table(),), teacher)
    assert teacher.config.table == "float32"
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_compressing_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"in int8 already.*lineage\.parent"):
        compress((Int8Table(), BFloat16Table()), _network())
    with pytest.raises(ConfigError, match=r"int8_weights already"):
        compress((Int8Linear(activations="none"), Int8Linear()), _network())
    with pytest.raises(ConfigError, match=r"rank 64; factorise once, before the table is rounded"):
        compress((Int8Table(), LowRankTable(keep="rows")), _network())
    with pytest.raises(ConfigError, match=r"rank 65 is above the network's width 64"):
        compress((LowRankTable(rank=65, keep="rows"),), _network())


def test_an_unknown_recipe_names_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no way to compress by str; known: .*bfloat16_table, .*int4_table"):
        compress(("int8",), _network())  # type: ignore[arg-type]


def test_lengths_follow_every_change_of_the_rows() -> None:
    """The cache must not outlive the rows: neither an in-place change, nor loading, nor an average of weights."""
    table = FloatTable(5, 4).requires_grad_(False)
    query_BD = torch.eye(4)[:2]
    for change in (
        lambda: table.weight_ID.mul_(3).add_(0.1),
        lambda: table.load_state_dict({"weight_ID": torch.randn(5, 4)}),
        lambda: torch._foreach_lerp_([table.weight_ID], [torch.randn(5, 4)], 0.5),
        lambda: table.load_state_dict({"weight_ID": torch.randn(5, 4)}, assign=True),
    ):
        table.cosine(query_BD)
        change()
        table.requires_grad_(False)
        torch.testing.assert_close(table.cosine(query_BD), query_BD @ table.directions().t())


def test_cosine_of_a_trained_table_has_gradients() -> None:
    table = FloatTable(5, 4)
    table.cosine(torch.eye(4)).square().sum().backward()
    assert table.weight_ID.grad is not None
    frozen = FloatTable(5, 4).requires_grad_(False)
    query_BD = torch.eye(4).requires_grad_()
    frozen.cosine(query_BD).sum().backward()
    torch.testing.assert_close(query_BD.grad, frozen.directions().sum(dim=0).expand(4, 4))


def test_measure_tells_a_slow_network_from_a_quick_one(history_BT: Tensor) -> None:
    torch.manual_seed(0)
    deep = Network(NetworkConfig(encoder=EncoderConfig(width=64, max_length=8, blocks=8)), N_ITEMS).eval()
    networks = {"deep": deep, "shallow": _network()}
    threads = torch.get_num_threads()
    times = measure(networks, History(history_BT), MeasureConfig(rounds=40, warmup_rounds=5, batches=(1, 16)))
    assert torch.get_num_threads() == threads
    for batch in (1, 16):
        shallow, slow = times["shallow"][batch], times["deep"][batch]
        assert slow.p50_ms > 1.5 * shallow.p50_ms
        assert shallow.p50_ms <= shallow.p99_ms
        assert shallow.users_per_s > slow.users_per_s
    assert times["shallow"][16].users_per_s > times["shallow"][1].users_per_s


def test_what_was_had_is_measured_as_it_is_served(history_BT: Tensor) -> None:
    history = History(history_BT[:5])
    for turn, rows in ((0, [0, 1, 2]), (1, [3, 4, 0])):
        asked = question(history, 3, turn, k=4, remove_seen=True)
        blocked = sorted(zip(asked.blocked_row_N.tolist(), asked.blocked_item_N.tolist(), strict=True))
        expected = sorted((row, item) for row, user in enumerate(rows) for item in history_BT[user].tolist() if item)
        assert blocked == expected
        free = question(history, 3, turn, k=4, remove_seen=False)
        assert (len(free.blocked_row_N), len(free.blocked_item_N), free.k) == (0, 0, 4)
        assert free.past is not None
        assert free.past.item_BT.tolist() == history_BT[rows].tolist()
