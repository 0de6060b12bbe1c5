"""The graph by which replicas answer small batches: the network's own queries, and refused where they are not.

# B users, T positions
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact import encoder_file
from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.encoder_file import SMALL, EncoderFile
from elasticrec.artifact.export import encoder
from elasticrec.artifact.export.encoder import encoder_onnx
from elasticrec.artifact.export.parity import made_up
from elasticrec.artifact.manifest import ENCODER
from elasticrec.artifact.registry import Registry
from elasticrec.cli.main import run
from elasticrec.data.inputs import Past
from elasticrec.errors import BundleError, ConfigError, ExportError
from elasticrec.model.bias import TimeGaps
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.features import EventInput, RatingInput
from elasticrec.model.head import DotHeadConfig, HeadConfig
from elasticrec.model.hstu import HSTUBlockConfig
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sasrec import SASRecBlockConfig
from elasticrec.serving.encoding import Encoding
from elasticrec.serving.gpu import Resident
from elasticrec.serving.question import Question
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.selfcheck import BundleRefusedError, check
from elasticrec.serving.setup import ModelSetup

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own imports
    from elasticrec.serving import opening
    from elasticrec.serving.arguments import Args
    from elasticrec.serving.opening import checked_scorer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

N_ITEMS, LENGTH, WIDTH = 300, 12, 16
SMALL_ENCODER = EncoderConfig(width=WIDTH, blocks=2, max_length=LENGTH)
ALL_INPUTS = replace(
    SMALL_ENCODER,
    time=TimeGaps(),
    rating=RatingInput(lowest=1, highest=5),
    event=EventInput(types=("view", "buy")),
    block=BlockConfig(residual_gates=True),
)
ONE_BLOCK = replace(SMALL_ENCODER, blocks=1)
KINDS = {
    "all inputs": NetworkConfig(encoder=ALL_INPUTS, head=HeadConfig(user_temperature=True)),
    "hstu": NetworkConfig(encoder=replace(ONE_BLOCK, block=HSTUBlockConfig(heads=2), time=TimeGaps())),
    "sasrec": NetworkConfig(encoder=replace(ONE_BLOCK, block=SASRecBlockConfig(heads=2)), head=DotHeadConfig()),
    "rounded": NetworkConfig(encoder=ONE_BLOCK, table="int8", linear="int8_stored"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def graph() -> bytes:
    """Of the network of SMALL_ENCODER and seed 0; it takes seconds to make."""
    return encoder_onnx(network_of(NetworkConfig(encoder=SMALL_ENCODER)))


def network_of(config: NetworkConfig, seed: int = 0) -> Network:
    """With numbers as far apart as training leaves them, whatever they are kept as."""
    torch.manual_seed(seed)
    network = Network(config, N_ITEMS)
    for tensor in network.state_dict().values():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor).abs())
    return network.eval().requires_grad_(False)


def some(past: Past, rows: slice, length: int) -> Past:
    """Some users, their newest events."""
    return Past(*(None if part is None else part[rows, -length:] for part in past))  # type: ignore[arg-type]


def published(network: Network, folder: Path, graph: bytes) -> Bundle:
    ids = [f"i{item}" for item in range(N_ITEMS)]
    columns = {"item_index": pa.array(range(1, N_ITEMS + 1), pa.int32()), "item_id": ids, "title": ids}
    items = pa.table(columns | {"categories": [["x"]] * N_ITEMS, "count": [1] * N_ITEMS})
    bundle = write_bundle(folder / "bundle", network, items, name="films", version="1")
    registry = Registry(folder / "registry")
    return registry.open("films", registry.publish(bundle, "films", lambda _: {ENCODER: graph}))


def scorer_of(bundle: Bundle) -> tuple[Network, Scorer]:
    """As a replica makes it."""
    network, content = bundle.network(), bundle.encoder()
    assert content is not None
    return network, Scorer(network, ModelSetup(network=network, graph=EncoderFile(content, network)))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_queries_are_those_of_the_network_for_any_batch(kind: str) -> None:
    network = network_of(KINDS[kind])
    file, history = EncoderFile(encoder_onnx(network), network), made_up(network, 40, seed=1)
    past = history.past()
    if past.rating_BT is not None:  # as serving knows them: not at all
        past.rating_BT[::2] = np.nan
    for rows, length in ((slice(0, 1), 1), (slice(39, 40), LENGTH), (slice(30, 33), 5), (slice(0, 40), LENGTH)):
        asked = some(past, rows, length)
        ours_BD = network.head.query(network.newest(history._make(map(_tensor, (*asked, None)))))
        np.testing.assert_allclose(file.query(asked).numpy(), ours_BD.numpy(), rtol=1e-4, atol=2e-4)


def _tensor(part: np.ndarray | None) -> torch.Tensor | None:
    return None if part is None else torch.from_numpy(part)


def test_replicas_ask_the_graph_for_small_batches_and_the_network_for_large_ones(
    graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, asked = network_of(NetworkConfig(encoder=SMALL_ENCODER)), []
    file = EncoderFile(graph, network)
    query = file.query
    monkeypatch.setattr(file, "query", lambda past: asked.append(past.item_BT.shape) or query(past))
    encoding, none_N = Encoding(ModelSetup(network=network, graph=file)), np.zeros(0, dtype=np.int64)
    most = SMALL // (WIDTH * LENGTH)
    with torch.inference_mode():
        for rows in (1, most, most + 1):
            past = Past(np.ones((rows, LENGTH), dtype=np.int32))
            encoding.encode(Question(past=past, blocked_row_N=none_N, blocked_item_N=none_N, k=1))
    assert asked == [(1, LENGTH), (most, LENGTH)]


def test_a_bundle_with_the_graph_of_another_network_is_refused(
    graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_file, "SMALL", LENGTH * WIDTH)  # lone questions alone, as it is with longer histories
    config = NetworkConfig(encoder=SMALL_ENCODER)
    good = published(network_of(config), tmp_path / "good", graph)
    bad = published(network_of(config, seed=1), tmp_path / "bad", graph)
    check(good, *scorer_of(good), None)
    with pytest.raises(BundleRefusedError, match="is refused"):
        check(bad, *scorer_of(bad), None)


def test_a_replica_on_a_cpu_answers_by_the_file_and_one_on_a_gpu_without(
    graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = published(network_of(NetworkConfig(encoder=SMALL_ENCODER)), tmp_path, graph)
    with ThreadPoolExecutor(1) as thread:

        def opened() -> EncoderFile | None:
            return checked_scorer(bundle, Args(bundle=bundle.uri), False, thread).setup.graph

        assert isinstance(opened(), EncoderFile)
        monkeypatch.setattr(opening, "move", lambda *_: Resident())
        assert opened() is None


def test_a_file_that_does_not_open_leaves_all_to_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = published(network_of(NetworkConfig(encoder=SMALL_ENCODER)), tmp_path, b"no graph")
    with pytest.raises(BundleError, match="does not open"):
        scorer_of(bundle)
    with ThreadPoolExecutor(1) as thread, caplog.at_level("WARNING", "ray.serve"):
        assert checked_scorer(bundle, Args(bundle=bundle.uri), False, thread).setup.graph is None
    assert "does not open" in caplog.text


def test_a_file_cannot_read_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: bytes) -> None:
    """A graph whose weights lie in a file of the folder that a replica runs in."""
    monkeypatch.chdir(tmp_path)
    model = onnx.load_from_string(graph)
    onnx.save(model, tmp_path / "with.onnx", save_as_external_data=True, location="secret", size_threshold=256)
    network = network_of(NetworkConfig(encoder=SMALL_ENCODER))
    with pytest.raises(BundleError, match="does not open"):
        EncoderFile((tmp_path / "with.onnx").read_bytes(), network)


def test_a_graph_that_computes_something_else_is_not_written(graph: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "write_onnx", lambda *given: given[-1].write_bytes(graph))
    with pytest.raises(ExportError, match="are off by up to"):
        encoder_onnx(network_of(NetworkConfig(encoder=SMALL_ENCODER), seed=1))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (NetworkConfig(encoder=MeanEncoderConfig(width=WIDTH, max_length=LENGTH)), "a mean of vectors has no graph"),
        (NetworkConfig(encoder=replace(SMALL_ENCODER, max_length=2)), "one or two events"),
        (NetworkConfig(encoder=SMALL_ENCODER, linear="int8"), "linear layers in int8"),
    ],
    ids=["mean", "short", "int8"],
)
def test_networks_without_a_graph_say_why(config: NetworkConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        encoder_onnx(network_of(config))


def test_publishing_makes_the_graph_and_says_why_there_is_none(
    graph: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish(bundle: str) -> Bundle:
        root = str(tmp_path / "there")
        assert run(["registry", "publish", bundle, "--name", "shop", "--root", root]) == 0
        return open_bundle(f"{root}/shop/versions/{len(Registry(root).versions('shop'))}")

    old = published(network_of(NetworkConfig(encoder=SMALL_ENCODER)), tmp_path, b"of another version")
    made = publish(old.uri).encoder()
    assert made is not None
    assert len(made) == len(graph)
    mean = network_of(NetworkConfig(encoder=MeanEncoderConfig(width=WIDTH, max_length=LENGTH)))
    published(mean, tmp_path / "mean", b"")
    capsys.readouterr()
    assert publish(str(tmp_path / "mean" / "bundle")).encoder() is None
    assert "without encoder.onnx" in capsys.readouterr().out
    damaged = tmp_path / "mean" / "bundle" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(AssertionError):
        publish(str(damaged.parent))
    told = capsys.readouterr()
    assert "is damaged" in told.err
    assert "graph" not in told.err + told.out  # nothing was made of it
