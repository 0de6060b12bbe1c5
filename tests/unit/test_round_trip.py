"""Compress, save, load in a fresh process that knows no compression: the same scores, for every kind of step."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import write_bundle
from elasticrec.columns import CATEGORIES, COUNT, ITEM, ITEM_INDEX, TITLE, USER, USER_INDEX
from elasticrec.compression.distil import Distil
from elasticrec.compression.factorise import LowRankTable
from elasticrec.compression.finetune import FineTune
from elasticrec.compression.linears import BFloat16Linear, Fp8Linear, Int4Linear, Int8Linear, SparseLinear
from elasticrec.compression.prune import Prune
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table, PQTable
from elasticrec.compression.recipe import Recipe, compress, described, label
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.data.sequences import Sequences, Store, write_store
from elasticrec.data.split import LeaveOneOut
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig

N_ITEMS, N_USERS, LENGTH = 400, 60, 8  # more items than words of a part
RECIPES: tuple[Recipe, ...] = (
    (),
    (BFloat16Table(),),
    (Int8Table(),),
    (Int4Table(),),
    *((PQTable(dims=dims),) for dims in (2, 4, 8)),
    (LowRankTable(rank=5),),
    (LowRankTable(rank=8), Int4Table()),
    (BFloat16Linear(),),
    (Int8Linear(), Int8Table()),
    (Int4Linear(),),
    (SparseLinear(), Int8Table()),
    (Fp8Linear(), Int4Table()),
    (Int8Linear(activations="none", memory="float32"), Int8Table(memory="float32")),
    (Int8Linear(activations="none"), LowRankTable(rank=8), PQTable()),
    (Prune(heads=0.5, channels=0.3, blocks=1, batches=1), FineTune(epochs=1), Int8Linear(), Int4Table()),
    (Distil(width=8, epochs=1), Int8Table()),
)
ELSEWHERE = """
import sys
import numpy as np, torch
from elasticrec.artifact.bundle import open_bundle
from elasticrec.model.history import History
item_BT = torch.from_numpy(np.load(sys.argv[1]))
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    np.save(f"{folder}.npy", open_bundle(folder).network().scores(History(item_BT)).numpy())
known = [name for name in sys.modules if name.startswith(("elasticrec.compression", "elasticrec.training", "ray"))]
assert not known, known
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=64, blocks=2, max_length=LENGTH)
    teacher = Network(NetworkConfig(encoder=encoder), N_ITEMS).eval().requires_grad_(False)
    return Workbench(
        teacher=teacher,
        store=_store(tmp_path / "store"),
        split=LeaveOneOut(),
        evaluation=EvaluationConfig(ks=(10,)),
        scratch=tmp_path / "scratch",
    )


def _store(folder: Path) -> Store:
    length = 9
    item_E = np.concatenate([(user * 7 + np.arange(length)) % N_ITEMS + 1 for user in range(N_USERS)])
    sequences = Sequences(item_E=item_E.astype(np.int32), offset_U1=np.arange(N_USERS + 1) * length)
    users = pa.table({USER_INDEX: np.arange(N_USERS), USER: [f"u{user}" for user in range(N_USERS)]})
    return write_store(folder, sequences, users, _items(), command="test")


def _items() -> pa.Table:
    ids = [f"i{item}" for item in range(N_ITEMS)]
    index_I = pa.array(range(1, N_ITEMS + 1), pa.int32())
    return pa.table(
        {ITEM_INDEX: index_I, ITEM: ids, TITLE: ids, CATEGORIES: [["x"]] * N_ITEMS, COUNT: [N_ITEMS] * N_ITEMS}
    )


def test_every_kind_of_step_is_here() -> None:
    """Of the product's own: other tests of this process register steps too."""
    own = {step.kind for step in apply.registry if step.__module__.startswith("elasticrec.") and hasattr(step, "kind")}
    assert {step.kind for recipe in RECIPES for step in recipe} == own


def test_a_fresh_process_scores_the_same(bench: Workbench, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    item_BT = random.integers(1, N_ITEMS + 1, (20, LENGTH))
    item_BT[np.arange(LENGTH) < random.integers(0, LENGTH, (20, 1))] = 0
    np.save(tmp_path / "histories.npy", item_BT)
    expected = {}
    for place, recipe in enumerate(RECIPES):
        network, folder = compress(recipe, bench), tmp_path / str(place)
        write_bundle(folder, network, _items(), name="films", version=label(recipe), recipe=described(recipe))
        expected[folder] = network.scores(History(torch.from_numpy(item_BT))).numpy()
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "histories.npy"), *map(str, expected)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for folder, recipe in zip(expected, RECIPES, strict=True):
        np.testing.assert_array_equal(np.load(f"{folder}.npy"), expected[folder], err_msg=label(recipe))
    different = {expected[folder].tobytes() for folder in expected}
    assert len(different) == len(RECIPES)  # no step is a way to do nothing
