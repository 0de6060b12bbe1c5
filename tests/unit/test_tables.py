"""Item tables and linear layers of few bits: every width, every batch, and what they are near to."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elasticrec.columns import COUNT, ITEM, ITEM_INDEX, USER, USER_INDEX
from elasticrec.compression.calibration import query_moment
from elasticrec.compression.codebooks import CodebookConfig, product_codes
from elasticrec.compression.factorise import LowRankTable
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.quantize import Int4Table, Int8Table, PQTable, int4_rows
from elasticrec.compression.recipe import Recipe, compress, label
from elasticrec.compression.workbench import Workbench
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.data.split import LeaveOneOut
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model import integers, linear
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.head import DotHeadConfig
from elasticrec.model.history import History
from elasticrec.model.int4 import packed
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.tables import make_table

N_ITEMS, N_USERS = 300, 60
WIDTHS = [2, 10, 64, 100, 128]
TABLES: list[Recipe] = [
    (Int4Table(),),
    (PQTable(dims=2, iterations=3),),
    (PQTable(dims=8, iterations=3),),
    (LowRankTable(rank=2),),
    (LowRankTable(rank=2), Int8Table()),
    (LowRankTable(rank=2), Int4Table()),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    item_UT = np.random.default_rng(0).integers(1, N_ITEMS + 1, (N_USERS, 10))
    sequences = Sequences(item_E=item_UT.reshape(-1).astype(np.int32), offset_U1=np.arange(0, N_USERS * 10 + 1, 10))
    users = pa.table({USER_INDEX: np.arange(N_USERS), USER: [f"u{user}" for user in range(N_USERS)]})
    index_I = np.arange(1, N_ITEMS + 1)
    count_I = np.bincount(sequences.item_E, minlength=N_ITEMS + 1)[1:]
    items = pa.table({ITEM_INDEX: index_I, ITEM: [f"i{item}" for item in index_I], COUNT: count_I})
    return write_store(tmp_path_factory.mktemp("few_bits") / "store", sequences, users, items, command="test")


def bench(store: Store, width: int) -> Workbench:
    torch.manual_seed(width)
    teacher = Network(NetworkConfig(encoder=EncoderConfig(width=width, max_length=8)), N_ITEMS).eval()
    return Workbench(
        teacher=teacher, store=store, split=LeaveOneOut(), evaluation=EvaluationConfig(), scratch=Path("unused")
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("recipe", TABLES, ids=label)
def test_a_table_answers_as_its_rows_do(
    recipe: Recipe, width: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = compress(recipe, bench(store, width)).encoder.items
    row_ID = table.rows()
    index_N2 = torch.tensor([[0, 1], [N_ITEMS, N_ITEMS // 2], [N_ITEMS // 2 + 1, 7]], dtype=torch.int32)
    torch.testing.assert_close(table(index_N2), row_ID[index_N2.long()], rtol=1e-6, atol=1e-7)
    assert row_ID[0].abs().max() == 0
    query_BD = F.normalize(torch.randn(32, width), dim=1)
    dot_BI, cosine_BI = table.dot(query_BD), table.cosine(query_BD)
    near = 0.03 * max(1.0, float((row_ID.norm(dim=1)).max()))
    torch.testing.assert_close(dot_BI, query_BD @ row_ID.t(), rtol=0, atol=near)
    assert cosine_BI[:, 0].abs().max() == 0
    monkeypatch.setattr(integers, "multiplies_int8", lambda _: False)
    torch.testing.assert_close(table.dot(query_BD), query_BD @ row_ID.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(table.cosine(query_BD), cosine_BI, rtol=0, atol=near)


@pytest.mark.parametrize("step", [Int4Table(), PQTable(iterations=1)], ids=["int4", "pq"])
def test_an_answer_does_not_depend_on_its_batch(step: Int4Table | PQTable, store: Store) -> None:
    table = compress((step,), bench(store, 64)).encoder.items
    query_BD = torch.randn(32, 64)
    if not integers.multiplies_int8(query_BD):
        query_BD = query_BD.round()  # whole numbers: float32 adds them exactly too
    cosine_BI = table.cosine(query_BD)
    for user in (0, 17, 31):
        assert torch.equal(table.cosine(query_BD[user : user + 1])[0], cosine_BI[user])


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_int4_rows_are_unpacked_as_they_were_packed(rows: int, width: int) -> None:
    integer_ID = torch.randint(-8, 8, (rows, width), generator=torch.Generator().manual_seed(rows))
    table = make_table("int4", rows, width)
    table.load_state_dict({"packed_HD": packed(integer_ID), "scale_I": torch.full((rows,), 1 / 16).bfloat16()})
    assert torch.equal(table.rows(), integer_ID.float())
    assert torch.equal(table(torch.arange(rows)), integer_ID.float())


def turned(row_ID: Tensor, other_ID: Tensor) -> float:
    return float(1 - F.cosine_similarity(row_ID, other_ID, dim=1).mean())


def test_int4_takes_a_better_step_than_that_of_the_largest_entry() -> None:
    row_ID = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    row_ID[:, 3] *= 4  # an outlier
    integer_ID, scale_I = int4_rows(row_ID)
    step_I1 = row_ID.abs().amax(dim=1, keepdim=True) / 7
    assert turned(integer_ID * scale_I[:, None], row_ID) < 0.9 * turned((row_ID / step_I1).round() * step_I1, row_ID)


def test_rounding_for_scores_errs_less_in_scores(store: Store) -> None:
    """With queries near few directions, as those of trained networks are."""
    row_ID = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    query_ND = torch.randn(500, 2) @ torch.randn(2, 32) + 0.05 * torch.randn(500, 32)
    moment_DD = (query_ND.t() @ query_ND / 500).double() + 0.01 * torch.eye(32, dtype=torch.float64)
    errors = []
    for moment in (None, moment_DD):
        integer_ID, scale_I = int4_rows(row_ID, moment)
        errors.append(float(((integer_ID * scale_I[:, None] - row_ID) @ query_ND.t()).square().mean()))
    assert errors[1] < 0.3 * errors[0]


def test_more_codes_are_nearer_and_few_rows_are_kept_exactly() -> None:
    row_ID = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    row_ID[0] = 0
    for dims, limit in ((8, 0.02), (2, 0.02)):  # 199 rows have a word each
        table = make_table(f"pq{dims}", 200, 16)
        table.load_state_dict(product_codes(row_ID, CodebookConfig(dims=dims, iterations=2, sample=1000, seed=0)))
        assert (table.rows() - row_ID).abs().max() < limit * row_ID.abs().max()


def test_full_rank_keeps_every_row_and_a_lower_one_keeps_scores(store: Store) -> None:
    work = bench(store, 16)
    teacher_ID = work.teacher.encoder.items.rows().detach()
    whole = compress((LowRankTable(rank=16),), work).encoder.items
    torch.testing.assert_close(whole.rows(), teacher_ID, rtol=5e-3, atol=1e-6)
    half = {keep: compress((LowRankTable(rank=8, keep=keep),), work).encoder.items for keep in ("scores", "rows")}
    moment_DD = query_moment(work.teacher, work)
    counted = {}
    for keep, table in half.items():
        error_ID = F.normalize(teacher_ID, dim=1) - table.left.rows() @ table.get_buffer("right_RD")
        counted[keep] = float(((error_ID.double() @ moment_DD) * error_ID).sum())
    assert counted["scores"] < 0.999 * counted["rows"]


def test_bytes_of_tables(store: Store) -> None:
    """Scales and, for many items, code books too; in float32 a row of width 64 has 256 bytes."""
    for precision, width, limit in (("int4", 64, 0.15), ("int4", 128, 0.15), ("pq4", 64, 0.08), ("pq8", 128, 0.05)):
        state = make_table(precision, 100_000, width).state_dict()
        assert sum(tensor.nbytes for tensor in state.values()) <= limit * 100_000 * width * 4


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_int8_layers_are_near_and_each_token_stands_alone(
    width: int, rounds_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(width)
    layer = torch.nn.Linear(width, 3 * width).requires_grad_(False)
    network = torch.nn.Sequential(layer)
    linear.set_linears(network, "int8" if rounds_inputs else "int8_weights")
    scale_O = layer.weight.abs().amax(dim=1) / 127
    integer_OD = (layer.weight / scale_O[:, None]).round().to(torch.int8)
    network[0].load_state_dict({"weight_OD": integer_OD, "scale_O": scale_O, "bias_O": layer.bias})
    x_BTD = torch.randn(3, 400, width)  # more tokens than one chunk
    y_BTO = network(x_BTD)
    assert y_BTO.shape == (3, 400, 3 * width)
    assert (y_BTO - layer(x_BTD)).abs().max() < 0.06
    if rounds_inputs:
        assert torch.equal(network(x_BTD[2, 399]), y_BTO[2, 399])
        monkeypatch.setattr(integers, "multiplies_int8", lambda _: False)
        assert torch.equal(network(x_BTD), y_BTO)


def test_a_network_without_any_parameter_answers(store: Store) -> None:
    work = bench(store, 8)
    config = NetworkConfig(encoder=MeanEncoderConfig(width=8, max_length=8), head=DotHeadConfig())
    mean = Network(config, N_ITEMS).eval()
    small = compress(
        (Int8Linear(), Int8Table()),
        Workbench(**{f: getattr(work, f) for f in ("store", "split", "evaluation", "scratch")}, teacher=mean),
    )
    assert not list(small.parameters())
    assert torch.isfinite(small.scores(History(torch.ones(2, 8, dtype=torch.int32)))[:, 1:]).all()


def test_settings_that_make_no_table_are_refused() -> None:
    with pytest.raises(ConfigError, match="dims 3 must be one of 2, 4, 8"):
        PQTable(dims=3)
    with pytest.raises(ConfigError, match="rank 0 must be at least 1"):
        LowRankTable(rank=0)
    with pytest.raises(ConfigError, match="rank 9 of an item table must be 1 to its width, 8"):
        make_table("int8", 10, 8, 9)
    with pytest.raises(ConfigError, match=r"no item table of precision 'int3'; known: .*int4"):
        make_table("int3", 10, 8)
