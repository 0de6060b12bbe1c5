"""What a network on a GPU has beside its weights; without a GPU all of it but the recording itself.

# B rows, T positions, D width
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from elasticrec.data.inputs import Past
from elasticrec.errors import ConfigError
from elasticrec.model.bias import TimeGaps
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.features import EventInput, RatingInput
from elasticrec.model.history import History, request_times
from elasticrec.model.hstu import HSTUBlockConfig
from elasticrec.model.mean import MeanEncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sasrec import SASRecBlockConfig
from elasticrec.model.topk import GroupedTopK, Keys
from elasticrec.serving import gpu
from elasticrec.serving.gpu import RecordedQueries, Resident, Staging, device_of, fix_shapes, move, sizes
from elasticrec.serving.question import Question
from elasticrec.serving.retrieval import ExactRetriever, adjust, best
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.setup import ModelSetup

LENGTH, WIDTH, ITEMS = 8, 16, 300
NONE = np.zeros(0, dtype=np.int64)
ENCODERS = {
    "gated": EncoderConfig(width=WIDTH, max_length=LENGTH, block=BlockConfig(attention="jagged")),
    "all inputs": EncoderConfig(
        width=WIDTH,
        max_length=LENGTH,
        time=TimeGaps(),
        rating=RatingInput(lowest=1, highest=5),
        event=EventInput(types=("view", "buy")),
    ),
    "hstu": EncoderConfig(width=WIDTH, max_length=LENGTH, block=HSTUBlockConfig()),
    "sasrec": EncoderConfig(width=WIDTH, max_length=LENGTH, block=SASRecBlockConfig()),
    "mean": MeanEncoderConfig(width=WIDTH, max_length=LENGTH),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network_of(kind: str = "gated") -> Network:
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=ENCODERS[kind]), ITEMS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return network.eval().requires_grad_(False)


def past_of(rows: int, columns: int, seed: int = 0) -> Past:
    """Histories of 1 to `columns` events, right-aligned."""
    rng = np.random.default_rng(seed)
    item_BT = rng.integers(1, ITEMS + 1, (rows, columns)).astype(np.int32)
    item_BT[np.arange(columns) < columns - rng.integers(1, columns + 1, (rows, 1))] = 0
    time_BT = np.where(item_BT > 0, 10**9 + rng.integers(0, 10**6, item_BT.shape).cumsum(axis=1), 0)
    return Past(
        item_BT=item_BT,
        time_BT=time_BT,
        request_BT=request_times(time_BT, np.full(rows, 2 * 10**9)),
        rating_BT=np.where(item_BT > 0, rng.integers(1, 6, item_BT.shape), 0).astype(np.float32),
        event_BT=np.where(item_BT > 0, rng.integers(-1, 2, item_BT.shape), 0).astype(np.int16),
    )


def queries(network: Network, past: Past) -> torch.Tensor:
    with torch.inference_mode():
        return network.head.query(network.newest(History.of(past)))


def test_sizes_of_batches() -> None:
    assert sizes(1) == [1]
    assert sizes(5) == [1, 2, 4, 8]
    assert sizes(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("columns", [3, LENGTH])
def test_fixed_shapes_change_no_query(kind: str, columns: int) -> None:
    network, fixed, past = network_of(kind), network_of(kind), past_of(5, columns)
    fix_shapes(fixed)
    staging = Staging.of(fixed.config.encoder.inputs, 8, LENGTH, torch.device("cpu"))
    staging.fill(past_of(8, LENGTH, seed=1))  # what another batch left
    staging.fill(past)
    with torch.inference_mode():
        found_BD = fixed.head.query(fixed.newest(staging.history))[:5]
    torch.testing.assert_close(found_BD, queries(network, past), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_recorded_looks_at_no_data_and_leaves_no_device(kind: str) -> None:
    network = network_of(kind)
    fix_shapes(network)
    encode_elsewhere(network)


def test_a_packed_network_could_not_be_recorded() -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        encode_elsewhere(network_of())


def encode_elsewhere(network: Network) -> None:
    """On a device that has no data: whatever asks for some, or mixes devices, raises."""
    with FakeTensorMode():
        for module in network.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # type: ignore[assignment]
        staging = Staging.of(network.config.encoder.inputs, 4, LENGTH, torch.device("meta"))
        with torch.no_grad():
            query_BD = network.head.query(network.newest(staging.history))
            score_BI = query_BD @ network.encoder.items.rows().t()
            adjust(score_BI, 0, question_of(past_of(4, LENGTH)))
            item_BK, _ = best(score_BI, 3)
    assert query_BD.shape == (4, WIDTH)
    assert item_BK.device.type == "meta"


def test_any_batch_goes_through_the_next_larger_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    network, replayed = network_of("all inputs"), []
    fix_shapes(network)

    def record(self: RecordedQueries, staging: Staging, *_: object) -> SimpleNamespace:
        rows = len(staging.history.item_BT)
        query_BD = torch.zeros(rows, WIDTH)

        def replay() -> None:
            replayed.append(rows)
            with torch.inference_mode():
                query_BD.copy_(self._pass(staging.history))

        return SimpleNamespace(staging=staging, query_BD=query_BD, graph=SimpleNamespace(replay=replay))

    monkeypatch.setattr(RecordedQueries, "_record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    recorded = RecordedQueries(network, 6)
    for rows, expected in ((1, [1]), (3, [4]), (8, [8]), (19, [8, 8, 4])):
        replayed.clear()
        past = past_of(rows, LENGTH)
        torch.testing.assert_close(recorded.of(past), queries(network, past), rtol=1e-4, atol=1e-4)
        assert replayed == expected


def question_of(given: Past, **others: object) -> Question:
    rng = np.random.default_rng(2)
    row_N = np.repeat(np.arange(len(given.item_BT)), 40)
    fields = {"blocked_row_N": row_N, "blocked_item_N": rng.integers(1, ITEMS + 1, len(row_N)), "k": 12}
    return Question(**({"past": given} | fields | others))  # type: ignore[arg-type]


def test_groups_find_what_the_product_of_all_finds() -> None:
    network, question = network_of(), question_of(past_of(6, LENGTH))
    resident = Resident(top=GroupedTopK(Keys.of(network), group=16))
    plain, grouped = (
        Scorer(network, ModelSetup(network=network, resident=which)).score(question) for which in (None, resident)
    )
    assert (plain.item_BK[:, :12] == grouped.item_BK[:, :12]).all()
    np.testing.assert_allclose(plain.score_BK[:, :12], grouped.score_BK[:, :12], rtol=1e-5)


def test_groups_are_asked_once_for_all_that_kernels_differ_by() -> None:
    asked = []

    class Noting(GroupedTopK):
        def top(self, query_BD: torch.Tensor, k: int, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append((len(query_BD), k))
            return super().top(query_BD, k, *rest)

    gpu.warm_up(Noting(Keys.of(network_of())), torch.zeros(64, WIDTH))
    assert {(1, 16), (15, 16), (16, 16), (31, 16), (32, 16), (63, 16), (64, 16), (1, 17)} <= set(asked)


def test_groups_end_a_row_that_has_fewer_items() -> None:
    network, past = network_of(), past_of(1, LENGTH)
    blocked = np.arange(1, ITEMS - 4)  # all but five
    question = question_of(past, blocked_row_N=np.zeros_like(blocked), blocked_item_N=blocked)
    retriever = ExactRetriever(ModelSetup(network=network, resident=Resident(top=GroupedTopK(Keys.of(network)))))
    item_BK, score_BK = retriever.retrieve(queries(network, past), question)
    assert set(item_BK[0, :5].tolist()) == set(range(ITEMS - 4, ITEMS + 1))
    assert torch.isneginf(score_BK[0, 5:]).all()


@pytest.mark.parametrize(
    "wish",
    [
        {"hidden_H": np.array([5])},
        {"bonus_row_M": np.array([0]), "bonus_item_M": np.array([7]), "bonus_M": np.array([50.0], dtype=np.float32)},
        {"past": None, "like_B": np.array([3, 4])},
    ],
)
def test_wishes_that_groups_do_not_know_are_answered_by_all_scores(wish: dict[str, object]) -> None:
    class Never(GroupedTopK):
        def top(self, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
            raise AssertionError("asked for a wish that it does not know")

    network = network_of()
    question = question_of(past_of(2, LENGTH), **wish)
    found, plain = (
        Scorer(network, ModelSetup(network=network, resident=which)).score(question)
        for which in (Resident(top=Never(Keys.of(network))), None)
    )
    assert (found.item_BK == plain.item_BK).all()


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # in Ray's own code
def test_a_replica_reserves_its_share() -> None:
    from elasticrec.serving.arguments import Args
    from elasticrec.serving.options import model_options, with_gpus

    args = Args(bundle="b", topology="split", num_gpus=0.25)
    assert model_options(args)["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.25}
    options = {"ray_actor_options": {"num_cpus": 2.0, "label_selector": {"kind": "gpu"}}}
    assert with_gpus(options, args)["ray_actor_options"]["label_selector"] == {"kind": "gpu"}
    assert device_of(0.0).type == "cpu"


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # in Ray's own code
def test_gpus_of_a_replica_are_whole_or_a_share_of_one() -> None:
    from elasticrec.serving.arguments import Args

    assert Args(bundle="b", num_gpus=2).num_gpus == 2
    with pytest.raises(ValueError, match=r"1\.5 GPUs: give a share below 1, or a whole number"):
        Args(bundle="b", num_gpus=1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_share_of_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="sees no GPU"):
        device_of(0.5)


def test_on_the_cpu_nothing_changes() -> None:
    network = network_of()
    with gpu.loading(torch.device("cpu")):
        assert move(network, torch.device("cpu"), 64) is None
    assert network.encoder.config.packed  # type: ignore[union-attr]


@needs_gpu
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_recorded_network_answers_as_on_the_cpu(kind: str) -> None:
    device, moved = torch.device("cuda"), network_of(kind)
    with gpu.loading(device):
        resident = move(moved, device, 8)
        assert resident is not None
        scorer = Scorer(moved, ModelSetup(network=moved, resident=resident))
    assert resident.queries is not None
    for rows in (1, 3, 8, 11):
        question = question_of(past_of(rows, LENGTH, seed=rows))
        plain, found = Scorer(network_of(kind)).score(question), scorer.score(question)
        np.testing.assert_allclose(found.query_BD, plain.query_BD, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.score_BK, plain.score_BK[:, : found.score_BK.shape[1]], rtol=1e-3, atol=1e-3)


@needs_gpu
def test_groups_on_a_gpu_find_what_the_product_of_all_finds() -> None:
    device, moved = torch.device("cuda"), network_of()
    with gpu.loading(device):
        move(moved, device, 8)
        resident = Resident(top=GroupedTopK(Keys.of(moved)))
        scorer = Scorer(moved, ModelSetup(network=moved, resident=resident))
    question = question_of(past_of(6, LENGTH))
    plain, found = Scorer(network_of()).score(question), scorer.score(question)
    assert (plain.item_BK[:, :12] == found.item_BK[:, :12]).mean() > 0.98  # near ties may change places
    np.testing.assert_allclose(plain.score_BK[:, :12], found.score_BK[:, :12], rtol=1e-3)
