"""Exports: the same scores and ten best as the bundle, whatever its tables and layers; what cannot be, is said.

# B users, T positions
"""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import Bundle, write_bundle
from elasticrec.artifact.export.folder import export_bundle
from elasticrec.artifact.export.formats import FORMATS, format_of
from elasticrec.artifact.export.graph import ScoreGraph
from elasticrec.artifact.export.parity import Parity, best, compare, made_up
from elasticrec.cli.main import run
from elasticrec.compression.factorise import LowRankTable
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table, PQTable
from elasticrec.compression.recipe import Recipe, compress, label
from elasticrec.compression.workbench import Workbench
from elasticrec.data.split import LeaveOneOut
from elasticrec.errors import ConfigError, ExportError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.bias import TimeGaps
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.features import EventInput, RatingInput
from elasticrec.model.head import DotHeadConfig
from elasticrec.model.hstu import HSTUBlockConfig
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sasrec import SASRecBlockConfig

# What PyTorch's own exporters do, and warn of.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

N_ITEMS, LENGTH, USERS = 300, 12, 1000
SMALL = EncoderConfig(width=16, blocks=2, max_length=LENGTH)
ROWS: tuple[Recipe, ...] = (
    (BFloat16Table(),),
    (Int8Table(),),
    (Int4Table(keep="rows"),),
    (PQTable(dims=4),),
    (LowRankTable(rank=8, keep="rows"), Int8Table()),
    (LowRankTable(rank=8, keep="rows"), PQTable(dims=2)),
    (Int8Linear(activations="none", memory="float32"), Int4Table(keep="rows")),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(config: NetworkConfig) -> Network:
    """With weights as far apart as training leaves them."""
    torch.manual_seed(0)
    made = Network(config, N_ITEMS)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        made.encoder.items.weight_ID[0] = 0
    return made.eval().requires_grad_(False)


def compressed(recipe: Recipe) -> Network:
    bench = Workbench(
        teacher=network(NetworkConfig(encoder=SMALL)),
        store=None,  # type: ignore[arg-type]  # steps that look at rows alone need no data
        split=LeaveOneOut(),
        evaluation=EvaluationConfig(),
        scratch=Path(),
    )
    return compress(recipe, bench)


def bundle_of(made: Network, folder: Path) -> Bundle:
    ids = [f"i{item}" for item in range(N_ITEMS)]
    columns = {"item_index": pa.array(range(1, N_ITEMS + 1), pa.int32()), "item_id": ids, "title": ids}
    items = pa.table(columns | {"categories": [["x"]] * N_ITEMS, "count": [1] * N_ITEMS})
    return write_bundle(folder, made, items, name="films", version="1")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bundle_and_its_export_answer_1000_users_alike(kind: str, tmp_path: Path) -> None:
    bundle = bundle_of(network(NetworkConfig(encoder=SMALL)), tmp_path / "bundle")
    export = export_bundle(bundle, kind, tmp_path / "out", made_up(bundle.network(), USERS, seed=1))
    assert (export.parity.users, export.parity.different) == (USERS, 0)
    assert export.parity.largest <= 1e-3
    told = json.loads((tmp_path / "out" / "edge.json").read_text())
    assert (told["format"], told["inputs"], told["max_length"], told["n_items"]) == (kind, ["item"], LENGTH, N_ITEMS)
    assert told["bundle"]["files"]["weights.safetensors"] == bundle.manifest.files["weights.safetensors"].sha256
    items = json.loads((tmp_path / "out" / "items.json").read_text())
    assert items == {"item_id": bundle.items()["item_id"].to_pylist(), "title": bundle.items()["title"].to_pylist()}


@pytest.mark.parametrize("recipe", ROWS, ids=label)
def test_compressed_bundles_export_with_their_own_arithmetic(recipe: Recipe, tmp_path: Path) -> None:
    bundle = bundle_of(compressed(recipe), tmp_path / "bundle")
    history = made_up(bundle.network(), USERS, seed=1)
    export = export_bundle(bundle, "onnx", tmp_path / "out", history)
    assert export.parity.holds()
    plain = export_bundle(bundle, "pt2", tmp_path / "pt2", history)
    assert plain.parity.holds()


def test_an_int8_table_stays_int8_in_the_file(tmp_path: Path) -> None:
    export_bundle(bundle_of(compressed((Int8Table(),)), tmp_path / "bundle"), "onnx", tmp_path / "out")
    weights = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    rows = {tensor.data_type for tensor in weights if list(tensor.dims) == [N_ITEMS + 1, SMALL.width]}
    assert rows == {onnx.TensorProto.INT8}


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(encoder=replace(SMALL, time=TimeGaps(), rating=RatingInput(lowest=1, highest=5))),
        NetworkConfig(encoder=replace(SMALL, event=EventInput(types=("view", "buy")))),
        NetworkConfig(encoder=replace(SMALL, block=HSTUBlockConfig(heads=2), time=TimeGaps())),
        NetworkConfig(encoder=replace(SMALL, block=SASRecBlockConfig(heads=2)), head=DotHeadConfig()),
        NetworkConfig(encoder=MeanEncoderConfig(width=16, max_length=LENGTH)),
    ],
    ids=["times and ratings", "event types", "hstu", "sasrec", "mean"],
)
def test_every_encoder_exports(config: NetworkConfig, tmp_path: Path) -> None:
    bundle = bundle_of(network(config), tmp_path / "bundle")
    export = export_bundle(bundle, "onnx", tmp_path / "out", made_up(bundle.network(), 100, seed=1))
    assert export.parity.holds()


def test_a_file_of_another_network_is_found_out(tmp_path: Path) -> None:
    """What `export_bundle` compares with would refuse a wrong file."""
    made = network(NetworkConfig(encoder=SMALL))
    other = network(NetworkConfig(encoder=SMALL))
    other.encoder.norm.weight.mul_(torch.linspace(0.5, 1.5, SMALL.width))
    format_of("pt2").write(ScoreGraph(other), LENGTH, tmp_path / "model.pt2")
    found = compare(made, format_of("pt2").open(tmp_path / "model.pt2", ("item",)), made_up(made, 50))
    assert not found.holds()
    assert found.largest > 1e-2
    assert found.different > 0


@pytest.mark.parametrize("different", [2, 3])
def test_a_file_with_other_best_items_is_refused(
    different: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Parity(users=200, largest=1e-6, different=different)
    monkeypatch.setattr("elasticrec.artifact.export.folder.compare", lambda *_, **__: found)
    bundle = bundle_of(network(NetworkConfig(encoder=SMALL)), tmp_path / "bundle")
    if different == 2:  # 1 %
        assert export_bundle(bundle, "pt2", tmp_path / "out").parity == found
        return
    with pytest.raises(ExportError, match="ten best items of 3 of 200 users are others"):
        export_bundle(bundle, "pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_best_are_those_of_a_whole_order_ties_and_all() -> None:
    rng = np.random.default_rng(0)
    score_BI = rng.integers(0, 9, (50, 200)).astype(np.float32)
    score_BI[3, 5:] = -np.inf
    assert (best(score_BI) == np.argsort(-score_BI, axis=1, kind="stable")[:, :10]).all()
    assert best(score_BI[:, :4]).shape == (50, 4)


def test_scores_that_are_no_numbers_are_found_out() -> None:
    made = network(NetworkConfig(encoder=SMALL))
    found = compare(
        made, lambda given: np.full((len(given["item"]), N_ITEMS + 1), np.nan, np.float32), made_up(made, 5)
    )
    assert found.largest == float("inf")


def test_mistakes_are_told(tmp_path: Path) -> None:
    bundle = bundle_of(network(NetworkConfig(encoder=SMALL)), tmp_path / "bundle")
    dynamic = bundle_of(compressed((Int8Linear(),)), tmp_path / "dynamic")
    with pytest.raises(ConfigError, match=r"linear layers in int8 give other scores elsewhere.*activations 'none'"):
        export_bundle(dynamic, "onnx", tmp_path / "out")
    with pytest.raises(ConfigError, match="no format 'tflite'; known: onnx, pt2, executorch-ready"):
        export_bundle(bundle, "tflite", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="is there already"):
        export_bundle(bundle, "pt2", tmp_path / "there")


def test_without_its_packages_a_format_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(network(NetworkConfig(encoder=SMALL)), tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match="needs onnxscript; install it"):
        export_bundle(bundle, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bundle_of(network(NetworkConfig(encoder=SMALL)), tmp_path / "bundle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = run(["bundle", "export", bundle.uri, "--format", "pt2", "--out", str(tmp_path / "out")])
    assert status == 0
    assert "largest difference" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["edge.json", "items.json", "model.pt2"]
