"""The stages of an answer, on a small random network: what is returned, what never is, and that batches change nothing.

# B users, T positions, K candidates
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elasticrec.artifact.bundle import Bundle, write_bundle
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.tables import TABLES, Precision
from elasticrec.serving.assortment import Assortment
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.events import EventStore, SqliteConfig, SqliteEventStore, StoredEvent
from elasticrec.serving.history import Histories, Request
from elasticrec.serving.postprocess import Recommendation
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.recommender import Recommender, SplitRecommender
from elasticrec.serving.retrieval import ExactRetriever
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.setup import GatewaySetup, ModelSetup

N_ITEMS = 30
MAX_LENGTH = 6


def item_table(n_items: int) -> pa.Table:
    index = np.arange(1, n_items + 1)
    return pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [None if number % 5 == 0 else f"Item {number}" for number in index],
            "categories": pa.array([["even"] if number % 2 == 0 else None for number in index], pa.list_(pa.string())),
            "count": index[::-1],
        }
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=8, blocks=1, max_length=MAX_LENGTH, block=BlockConfig(heads=2))
    network = Network(NetworkConfig(encoder=encoder), N_ITEMS).eval()
    with torch.no_grad():  # far enough apart that rounding does not decide
        network.encoder.items.get_parameter("weight_ID").normal_()
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    return write_bundle(folder, network, item_table(N_ITEMS), name="tiny", version="1")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventStore]:
    store = SqliteEventStore(SqliteConfig(path=tmp_path_factory.mktemp("events") / "events.sqlite"))
    store.append([StoredEvent(user_id="ann", item_id=f"i{number}", timestamp=0) for number in range(1, 21)])
    store.append([StoredEvent(user_id="new", item_id="not in the catalogue", timestamp=0)])
    yield store
    store.close()


@pytest.fixture(scope="module")
def recommender(bundle: Bundle, events: EventStore) -> Recommender:
    return Recommender(bundle, events)


def histories_of(bundle: Bundle, events: EventStore) -> Histories:
    encoder = EncoderConfig(width=8, max_length=MAX_LENGTH)
    return Histories(GatewaySetup(assortment=Assortment(Catalogue(bundle.items())), events=events, encoder=encoder))


def scores(answer: Recommendation) -> list[float | None]:
    return [item.score for item in answer.items]


def ids(recommender: Recommender, request: Request) -> list[str]:
    return [item.item_id for item in recommender.recommend([request])[0].items]


def test_the_answer_is_the_best_of_the_whole_catalogue(bundle: Bundle, recommender: Recommender) -> None:
    """Against the network's own scores, with the history padded to its full length."""
    score_I = bundle.network().scores(History(torch.tensor([[0, 0, 0, 7, 3, 12]])))[0].clone()
    score_I[[7, 3, 12, 5]] = float("-inf")
    expected = [f"i{index}" for index in score_I.argsort(descending=True)[:8].tolist()]
    (answer,) = recommender.recommend([Request(k=8, history=("i7", "i3", "i12"), exclude=("i5",))])
    assert [item.item_id for item in answer.items] == expected
    assert [item.score for item in answer.items] == pytest.approx(score_I.sort(descending=True)[0][:8].tolist(), 1e-4)
    assert answer.source == "model"
    assert answer.history_length == 3
    assert set(answer.timings_ms) == {"history", "encode", "retrieve", "rank", "postprocess"}


def test_a_long_history_counts_with_its_newest_events_but_blocks_with_all(recommender: Recommender) -> None:
    (answer,) = recommender.recommend([Request(k=N_ITEMS, user_id="ann")])
    assert answer.history_length == MAX_LENGTH
    assert {item.item_id for item in answer.items} == {f"i{number}" for number in range(21, 31)}
    newest = Request(k=10, history=tuple(f"i{number}" for number in range(15, 21)), exclude=tuple(
        f"i{number}" for number in range(1, 15)))  # fmt: skip
    assert ids(recommender, newest) == [item.item_id for item in answer.items]


def test_a_history_in_the_request_comes_after_the_stored_one(recommender: Recommender) -> None:
    stored = tuple(f"i{number}" for number in range(1, 21))
    mixed = Request(k=5, user_id="ann", history=("i25",))
    assert ids(recommender, mixed) == ids(recommender, Request(k=5, history=(*stored, "i25")))
    assert ids(recommender, mixed) != ids(recommender, Request(k=5, user_id="ann", exclude=("i25",)))


@pytest.mark.parametrize(
    "request_",
    [Request(k=4), Request(k=4, user_id="nobody"), Request(k=4, user_id="new"), Request(k=4, history=("?", "i0"))],
)
def test_who_has_no_known_history_gets_what_is_popular(recommender: Recommender, request_: Request) -> None:
    (answer,) = recommender.recommend([request_])
    assert [item.item_id for item in answer.items] == ["i1", "i2", "i3", "i4"]
    assert [item.title for item in answer.items] == ["Item 1", "Item 2", "Item 3", "Item 4"]
    assert [item.score for item in answer.items] == [None] * 4
    assert answer.source == "popularity"
    assert "encode" not in answer.timings_ms


def test_what_is_kept_of_a_user_ends_with_any_change_of_the_store(bundle: Bundle, tmp_path: Path) -> None:
    here, there = (SqliteEventStore(SqliteConfig(path=tmp_path / "events.sqlite")) for _ in range(2))
    here.append([StoredEvent(user_id="ann", item_id="i1", timestamp=0)])
    reads: list[str] = []
    history = here.history
    here.history = lambda user, limit: reads.append(user) or history(user, limit)  # type: ignore[method-assign, func-returns-value]
    model = Recommender(bundle, here)

    def length(**wishes: Any) -> int:
        return model.recommend([Request(k=3, user_id="ann", **wishes)])[0].history_length

    assert [length(), length()] == [1, 1]
    assert reads == ["ann"]
    there.append([StoredEvent(user_id="ann", item_id="i2", timestamp=0)])
    assert length() == 2
    assert length(history=("i3",)) == 3
    assert length() == 2
    assert "i2" not in [item.item_id for item in model.recommend([Request(k=20, user_id="ann")])[0].items]
    there.erase("ann")
    assert model.recommend([Request(k=3, user_id="ann")])[0].source == "popularity"
    here.close()
    there.close()


def test_unknown_items_of_a_history_are_passed_over(recommender: Recommender) -> None:
    with_unknown = Request(k=5, history=("?", "i7", "i999", "i3"), exclude=("??",))
    assert ids(recommender, with_unknown) == ids(recommender, Request(k=5, history=("i7", "i3")))


item_ids = st.lists(st.integers(0, N_ITEMS + 3).map(lambda number: f"i{number}"), max_size=N_ITEMS + 5)
requests = st.builds(
    Request,
    k=st.integers(1, 200),
    user_id=st.sampled_from([None, "ann", "new", "nobody"]),
    history=item_ids.map(tuple),
    exclude=item_ids.map(tuple),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(requests, min_size=1, max_size=6))
def test_nothing_blocked_comes_back_and_k_do_whenever_there_are(
    recommender: Recommender, events: EventStore, batch: list[Request]
) -> None:
    for request, answer in zip(batch, recommender.recommend(batch), strict=True):
        given_back = [item.item_id for item in answer.items]
        blocked = {*request.history, *request.exclude}
        if request.user_id is not None:
            blocked |= events.seen(request.user_id)
        free = {f"i{number}" for number in range(1, N_ITEMS + 1)} - blocked
        assert set(given_back) <= free
        assert len(given_back) == len(set(given_back)) == min(request.k, len(free))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(requests, min_size=2, max_size=6))
def test_company_in_a_batch_changes_no_answer(recommender: Recommender, batch: list[Request]) -> None:
    together = recommender.recommend(batch)
    for request, answer in zip(batch, together, strict=True):
        (alone,) = recommender.recommend([request])
        assert [item.item_id for item in answer.items] == [item.item_id for item in alone.items]
        if answer.source == "model":
            assert scores(answer) == pytest.approx(scores(alone), rel=1e-4, abs=1e-4)


def test_split_gives_the_same_answers_in_one_call_a_batch(
    bundle: Bundle, events: EventStore, recommender: Recommender
) -> None:
    scorer = Scorer(bundle.network())
    asked: list[Question] = []

    async def score(question: Question) -> Candidates:
        asked.append(question)
        return scorer.score(question)

    batch = [Request(k=3, user_id="ann"), Request(k=7, user_id="nobody"), Request(k=5, history=("i2",))]
    with ThreadPoolExecutor(1) as executor:
        split = SplitRecommender(bundle, events, score, executor)
        answers = asyncio.run(split.recommend(batch))
        assert [answer.items for answer in answers] == [answer.items for answer in recommender.recommend(batch)]
        asyncio.run(split.recommend([Request(k=7, user_id="nobody")]))
    assert len(asked) == 1  # nobody's history needs no model
    assert asked[0].past.item_BT.shape == (2, MAX_LENGTH)
    assert asked[0].k == 6  # one more than is shown says whether there are more


def test_a_question_holds_arrays_only(bundle: Bundle, events: EventStore) -> None:
    question = (
        histories_of(bundle, events)
        .prepare([Request(k=3, history=("i2", "i9")), Request(k=4, history=("i1",))])
        .question
    )
    assert question is not None
    assert question.past.item_BT.tolist() == [[2, 9], [0, 1]]
    assert question.past.item_BT.dtype == np.int32
    assert sorted(zip(question.blocked_row_N.tolist(), question.blocked_item_N.tolist(), strict=True)) == [
        (0, 2),
        (0, 9),
        (1, 1),
    ]


def test_stored_items_that_the_model_does_not_know_push_no_known_ones_out(bundle: Bundle, events: EventStore) -> None:
    known = [f"i{number}" for number in range(1, MAX_LENGTH + 2)]
    mixed = [item_id for number, name in enumerate(known) for item_id in (f"x{number}", name, f"y{number}")]
    events.append([StoredEvent(user_id="mixed", item_id=item_id, timestamp=0) for item_id in mixed])
    (background,) = histories_of(bundle, events).prepare([Request(k=1, user_id="mixed")]).backgrounds
    assert background.items.tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("precision", TABLES)
@pytest.mark.parametrize("n_items", [49, 3_000])  # the second has more than one block of scores for each candidate
def test_retrieval_is_exact_for_every_table(precision: Precision, n_items: int) -> None:
    torch.manual_seed(0)
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1), table=precision), n_items).eval()
    table = network.encoder.items
    state = {name: torch.randint(-9, 9, value.shape).to(value.dtype) for name, value in table.state_dict().items()}
    table.load_state_dict(state)
    question = Question(past=None, blocked_row_N=np.array([0, 2]), blocked_item_N=np.array([11, 12]), k=7)
    with torch.inference_mode():
        query_BD = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
        expected_BI = table.cosine(query_BD)
        item_BK, score_BK = ExactRetriever(ModelSetup(network=network)).retrieve(query_BD, question)
    expected_BI = expected_BI.clone()
    expected_BI[:, 0] = expected_BI[0, 11] = expected_BI[2, 12] = -9
    expected = expected_BI.topk(item_BK.shape[1])
    assert item_BK.shape[1] >= 7
    torch.testing.assert_close(score_BK, expected.values)
    torch.testing.assert_close(expected_BI.gather(1, item_BK), expected.values)
    assert not (item_BK == 0).any()


def test_what_is_popular_skips_what_is_blocked() -> None:
    catalogue = Catalogue(item_table(6))
    assert catalogue.popular(3, np.array([2, 1], dtype=np.int32)).tolist() == [3, 4, 5]
    assert catalogue.popular(10, np.array([6], dtype=np.int32)).tolist() == [1, 2, 3, 4, 5]


def test_items_are_found_by_their_id() -> None:
    catalogue = Catalogue(item_table(6))
    found = catalogue.find("i4")
    assert found is not None
    assert (found.item_id, found.title, found.categories, found.count) == ("i4", "Item 4", ("even",), 3)
    assert catalogue.find("i7") is None
    assert catalogue.find("") is None
    assert "i4" in catalogue
    assert catalogue.indices(["i4", "?", "i1", "i4"]).tolist() == [4, 1, 4]
