"""Filters, boosts, diversity, pages, what is returned again, and stages of one's own: against the scores themselves."""

import math
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elasticrec.artifact.bundle import Bundle, write_bundle
from elasticrec.compression.quantize import int8_rows, with_rounded_rows
from elasticrec.errors import ConfigError
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving import retrieval
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.diversity import diversify
from elasticrec.serving.events import EventStore, SqliteConfig, SqliteEventStore, StoredEvent
from elasticrec.serving.filters import AttributeFilter, CategoryFilter, Filters, Masks, allows
from elasticrec.serving.history import Request
from elasticrec.serving.prior import Prior, PriorConfig
from elasticrec.serving.question import Question
from elasticrec.serving.ranking import Ranker
from elasticrec.serving.recommender import Recommender
from elasticrec.serving.retrieval import best
from elasticrec.serving.setup import STAGES, StagesConfig, check_stages

N_ITEMS = 60
NAMES = ["even", "third", "fifth"]
COLOURS = ["red", "blue", None]


def item_table() -> pa.Table:
    index = np.arange(1, N_ITEMS + 1)
    return pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [f"Item {number}" for number in index],
            "categories": pa.array([categories(number) or None for number in index.tolist()], pa.list_(pa.string())),
            "count": (N_ITEMS - index) * 10,
            "colour": [COLOURS[number % 3] for number in index],
            "price": pa.array([None if number % 7 == 0 else float(number) for number in index], pa.float64()),
            "new": [number > 50 for number in index],
            "published": [0 if number < 59 else 4_000_000_000 for number in index],
        }
    )


def categories(number: int) -> list[str]:
    return [name for name, step in zip(NAMES, (2, 3, 5), strict=True) if number % step == 0]


def make_bundle(folder: Path, lineage: dict[str, Any] | None = None, table: str = "float32") -> Bundle:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=16, blocks=1, max_length=6, block=BlockConfig(heads=2))
    network = Network(NetworkConfig(encoder=encoder), N_ITEMS).eval()
    with torch.no_grad():
        network.encoder.items.get_parameter("weight_ID").normal_()
    if table == "int8":
        names = ("weight_ID", "scale_I")
        network = with_rounded_rows(network, "int8", lambda row_ID: dict(zip(names, int8_rows(row_ID), strict=True)))
    return write_bundle(folder, network, item_table(), name="tiny", version="1", lineage=lineage)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventStore]:
    store = SqliteEventStore(SqliteConfig(path=tmp_path_factory.mktemp("events") / "events.sqlite"))
    store.append([StoredEvent(user_id="ann", item_id=f"i{number}", timestamp=0) for number in range(1, 40)])
    yield store
    store.close()


@pytest.fixture(scope="module")
def recommender(bundle: Bundle, events: EventStore) -> Recommender:
    return Recommender(bundle, events)


def ids(recommender: Recommender, request: Request) -> list[str]:
    return [item.item_id for item in recommender.recommend([request])[0].items]


def score_of(bundle: Bundle, *history: int) -> dict[str, float]:
    score_I = bundle.network().scores(History(torch.tensor([[0] * (6 - len(history)) + list(history)])))[0]
    return {f"i{index}": float(score_I[index]) for index in range(1, N_ITEMS + 1)}


values = st.sampled_from(["red", "blue", "green", True, False, 1.0, 7.0, 30.0])
rules = st.builds(
    AttributeFilter,
    any=st.lists(values, max_size=2),
    none=st.lists(values, max_size=2),
    min=st.none() | st.floats(0, 60),
    max=st.none() | st.floats(0, 60),
)
names = st.lists(st.sampled_from([*NAMES, "no such"]), max_size=2)
filters_ = st.builds(
    Filters,
    categories=st.builds(CategoryFilter, any=names, all=names, none=names),
    attributes=st.dictionaries(st.sampled_from(["colour", "price", "new", "weight"]), rules, max_size=2),
)


@settings(deadline=None, max_examples=300)
@given(filters=filters_)
def test_a_mask_says_of_all_items_what_the_rule_says_of_each(filters: Filters) -> None:
    catalogue = Catalogue(item_table())
    expected = [allows(filters, catalogue.item(index)) for index in range(1, N_ITEMS + 1)]
    mask_I = Masks(catalogue).mask(filters)
    assert mask_I[1:].tolist() == expected
    assert not mask_I[0]


def test_whole_numbers_beyond_those_of_floats_are_compared_as_floats() -> None:
    codes = [2**53 + 1, 2**62 + 1, 5, *range(10, N_ITEMS + 7)]
    catalogue = Catalogue(item_table().append_column("code", pa.array(codes, pa.int64())))
    for rule in ({"any": [float(2**53)]}, {"none": [5]}, {"min": 2.0**53}, {"max": 2.0**62}, {"min": 2.0**62}):
        filters = Filters.model_validate({"attributes": {"code": rule}})
        expected = [allows(filters, catalogue.item(index)) for index in range(1, N_ITEMS + 1)]
        assert Masks(catalogue).mask(filters)[1:].tolist() == expected, rule
    wanted = Filters.model_validate({"attributes": {"code": {"min": 2.0**53}}})
    assert Masks(catalogue).mask(wanted)[1:].tolist() == [True, True] + [False] * (N_ITEMS - 2)


def test_rules_by_hand() -> None:
    item = Catalogue(item_table()).item(30)
    assert item.attributes == {"colour": "red", "price": 30.0, "new": False}

    def passes(**rule: Any) -> bool:
        return allows(Filters.model_validate(rule), item)

    assert passes(categories={"any": ["third", "x"], "all": ["even", "fifth"], "none": ["x"]})
    assert not passes(categories={"any": ["x"]})
    assert not passes(categories={"all": ["even", "x"]})
    assert not passes(categories={"none": ["fifth"]})
    assert passes(attributes={"price": {"min": 30, "max": 30}, "colour": {"any": ["red"], "none": ["blue"]}})
    assert not passes(attributes={"price": {"min": 30.5}})
    assert not passes(attributes={"new": {"any": [0.0]}})  # false is not 0
    assert passes(attributes={"new": {"any": [False]}})
    assert not passes(attributes={"weight": {"min": 0}})
    assert passes(attributes={"weight": {"none": ["x"]}})


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    filters=filters_, k=st.integers(1, 70), user=st.sampled_from(["ann", "nobody"]), diversity=st.sampled_from([0, 0.5])
)
def test_filters_never_starve_an_answer(
    recommender: Recommender, filters: Filters, k: int, user: str, diversity: float
) -> None:
    """k come back whenever the catalogue has k that pass and that the user has not seen."""
    request = Request(k=k, user_id=user, filters=filters, diversity=diversity)
    catalogue = recommender.catalogue
    first = 40 if user == "ann" else 1
    free = {f"i{index}" for index in range(first, N_ITEMS + 1) if allows(filters, catalogue.item(index))}
    given_back = ids(recommender, request)
    assert set(given_back) <= free
    assert len(given_back) == len(set(given_back)) == min(k, len(free))


def test_a_filter_of_one_request_is_not_that_of_its_neighbours(recommender: Recommender) -> None:
    even = Filters(categories=CategoryFilter(any=["even"]))
    batch = [
        Request(k=60, history=("i1",)),
        Request(k=60, history=("i1",), filters=even),
        Request(k=60, history=("i2",)),
    ]
    numbers = [[int(item.item_id[1:]) for item in answer.items] for answer in recommender.recommend(batch)]
    assert [len(found) for found in numbers] == [59, 30, 59]
    assert all(number % 2 == 0 for number in numbers[1])


def test_boosts_multiply_odds_and_add_up(bundle: Bundle, recommender: Recommender) -> None:
    score = score_of(bundle, 7, 9)
    for item_id in score:
        number = int(item_id[1:])
        score[item_id] += math.log(50) * (number == 12) + math.log(0.1) * (number % 2 == 0)
    expected = sorted(set(score) - {"i7", "i9"}, key=lambda item_id: -score[item_id])
    boosts = {"item_boosts": (("i12", 50.0), ("unknown", 3.0)), "category_boosts": (("even", 0.1), ("no such", 9.0))}
    (answer,) = recommender.recommend([Request(k=20, history=("i7", "i9"), **boosts)])
    assert [item.item_id for item in answer.items] == expected[:20]
    assert [item.score for item in answer.items] == pytest.approx([score[name] for name in expected[:20]], abs=1e-3)


def test_boosts_count_among_popular_items_too(recommender: Recommender) -> None:
    assert ids(recommender, Request(k=3))[0] == "i1"
    assert ids(recommender, Request(k=3, item_boosts=(("i40", 100.0),)))[:2] == ["i40", "i1"]


def test_debias_and_freshness_reach_the_choice_among_all(bundle: Bundle, events: EventStore) -> None:
    prior = PriorConfig(debias=1.0, freshness=15.0)
    found = Recommender(bundle, events, stages=StagesConfig(prior=prior)).recommend([Request(k=60, history=("i7",))])
    score, counts = score_of(bundle, 7), Catalogue(item_table()).count_I
    for item_id in score:
        number = int(item_id[1:])
        score[item_id] += 15.0 * (number >= 59) - math.log((counts[number] + 1) / (counts[1:].mean() + 1))
    expected = sorted(set(score) - {"i7"}, key=lambda item_id: -score[item_id])
    assert [item.item_id for item in found[0].items] == expected


def test_freshness_halves() -> None:
    counts, day = np.array([0, 1]), 86_400
    prior = Prior(PriorConfig(freshness=2.0, half_life_days=10), counts, np.array([0, 0]))
    now_s = int(time.time())
    assert prior.of(1, now_s) == pytest.approx(2.0, abs=1e-3)
    assert prior.of(1, now_s - 10 * day) == pytest.approx(1.0, abs=1e-3)
    assert prior.of(1, None) == 0
    assert prior.of_all() is not None
    assert Prior(PriorConfig(), counts, np.array([0, 0])).of_all() is None


def test_diversity_0_keeps_the_order_and_1_runs_from_what_was_chosen() -> None:
    relevance_K = np.array([1.0, 0.9, 0.8, 0.1], dtype=np.float32)
    direction_KD = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    assert diversify(relevance_K, direction_KD, 0.0, 4).tolist() == [0, 1, 2, 3]
    # by hand: 1 - the copy at cosine 1 comes last; the orthogonal one and the opposite one tie at 0
    assert diversify(relevance_K, direction_KD, 1.0, 4).tolist()[-1] == 1
    assert diversify(relevance_K, direction_KD, 0.5, 3).tolist() == [0, 2, 3]
    assert diversify(relevance_K[:0], direction_KD[:0], 0.5, 3).tolist() == []


def test_a_diverse_answer_is_less_alike(bundle: Bundle, recommender: Recommender) -> None:
    def alike(diversity: float) -> float:
        answer = ids(recommender, Request(k=10, history=("i7",), diversity=diversity))
        index = torch.tensor([int(item_id[1:]) for item_id in answer])
        key_KD = torch.nn.functional.normalize(bundle.network().encoder.items(index), dim=-1)
        return float((key_KD @ key_KD.t()).triu(1).clamp(min=0).sum())

    assert ids(recommender, Request(k=10, history=("i7",), diversity=0.001)) == ids(
        recommender, Request(k=10, history=("i7",))
    )
    assert alike(0.7) < 0.8 * alike(0.0)


def test_diversity_of_popular_items_is_that_of_categories(recommender: Recommender) -> None:
    plain = ids(recommender, Request(k=4, filters=Filters(categories=CategoryFilter(any=NAMES))))
    spread = ids(recommender, Request(k=4, filters=Filters(categories=CategoryFilter(any=NAMES)), diversity=0.9))
    assert plain == ["i2", "i3", "i4", "i5"]
    assert spread[:3] == ["i2", "i3", "i5"]  # i4 is as even as i2


@pytest.mark.parametrize("diversity", [0.0, 0.6])
@pytest.mark.parametrize("history", [("i7",), ()])
def test_pages_fit_together(recommender: Recommender, history: tuple[str, ...], diversity: float) -> None:
    whole = ids(recommender, Request(k=60, history=history, diversity=diversity))
    pages, offset = [], 0
    while True:
        (answer,) = recommender.recommend([Request(k=7, offset=offset, history=history, diversity=diversity)])
        pages += [item.item_id for item in answer.items]
        offset += 7
        if not answer.more:
            break
    assert pages == whole
    assert len(whole) == 60 - len(history)


def test_what_was_had_comes_back_where_that_is_the_policy(
    bundle: Bundle, events: EventStore, recommender: Recommender, tmp_path: Path
) -> None:
    again = make_bundle(tmp_path / "again", lineage={"remove_seen": False})
    shop = Recommender(again, events)
    assert len(ids(shop, Request(k=60, user_id="ann"))) == 60
    assert "i12" not in ids(shop, Request(k=60, user_id="ann", exclude=("i12",)))
    assert len(ids(shop, Request(k=60, user_id="ann", remove_seen=True))) == 21
    told = Recommender(again, events, stages=StagesConfig(remove_seen=True))
    assert len(ids(told, Request(k=60, user_id="ann"))) == 21
    assert len(ids(recommender, Request(k=60, user_id="ann"))) == 21
    assert len(ids(recommender, Request(k=60, user_id="ann", remove_seen=False))) == 60


def test_a_long_history_is_left_out_as_a_whole(recommender: Recommender, events: EventStore) -> None:
    """More events than are read for the network: the rest is asked for too."""
    events.append([StoredEvent(user_id="old", item_id="i60", timestamp=0)])
    events.append([StoredEvent(user_id="old", item_id="i1", timestamp=0)] * 100)
    assert "i60" not in ids(recommender, Request(k=60, user_id="old"))


def test_items_alike_are_those_of_the_nearest_vectors(bundle: Bundle, recommender: Recommender) -> None:
    cosine_I = bundle.network().encoder.items.directions() @ bundle.network().encoder.items.directions()[5]
    cosine_I[[0, 5]] = -9
    (answer, other) = recommender.recommend([Request(k=8, like="i5"), Request(k=2, history=("i5",))])
    assert [item.item_id for item in answer.items] == [f"i{index}" for index in cosine_I.topk(8).indices.tolist()]
    assert [item.score for item in answer.items] == pytest.approx(cosine_I.topk(8).values.tolist(), abs=1e-5)
    assert answer.source == "model"
    assert [item.item_id for item in other.items] == ids(recommender, Request(k=2, history=("i5",)))


def test_a_reason_is_the_nearest_item_of_the_history(bundle: Bundle, recommender: Recommender) -> None:
    history, length = ("i3", "?", "i14", "i15", "i3"), 6
    weight_ID = bundle.network().encoder.items.get_parameter("weight_ID").detach().numpy()
    row_ID = weight_ID / np.linalg.norm(weight_ID, axis=1, keepdims=True)
    asked = Request(k=20, history=history[-length:], explain=True)
    explained, silent = recommender.recommend([asked, replace(asked, explain=False)])
    assert explained.items == silent.items
    assert silent.reasons == ()
    known = [3, 14, 15]
    for item, reason in zip(explained.items, explained.reasons, strict=True):
        nearest = known[int(np.argmax(row_ID[known] @ row_ID[int(item.item_id[1:])]))]
        assert reason is not None
        assert reason.item_id == f"i{nearest}"
    assert len({reason.item_id for reason in explained.reasons if reason}) > 1
    (popular,) = recommender.recommend([Request(k=3, history=("?",), explain=True)])
    assert popular.reasons == (None, None, None)


def test_reasons_stay_with_their_items_when_an_answer_is_spread(recommender: Recommender) -> None:
    asked = Request(k=30, history=("i3", "i14"), explain=True)
    straight, spread = recommender.recommend([asked, replace(asked, diversity=0.8)])
    known = dict(zip((item.item_id for item in straight.items), straight.reasons, strict=True))
    both = [(item.item_id, reason) for item, reason in zip(spread.items, spread.reasons, strict=True)]
    assert all(known.get(item_id, reason) == reason for item_id, reason in both)
    assert [item_id for item_id, _ in both] != [item.item_id for item in straight.items]


def test_only_some_items_are_put_in_order(bundle: Bundle, recommender: Recommender) -> None:
    score = score_of(bundle, 7)
    wanted = ("i30", "i3", "unknown", "i44", "i7")
    given_back = ids(recommender, Request(k=9, history=("i7",), only=wanted, remove_seen=False))
    assert given_back == sorted(["i30", "i3", "i44", "i7"], key=lambda item_id: -score[item_id])


def test_narrow_filters_multiply_few_items_and_give_the_same_scores(
    bundle: Bundle, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Filters(attributes={"price": AttributeFilter(min=58)})
    batch = [Request(k=9, history=("i7",), filters=few), Request(k=9, like="i5", filters=few)]
    whole = [answer.items for answer in recommender.recommend(batch)]
    monkeypatch.setattr(retrieval, "_FEW", 1)  # 60 items are too few for it otherwise
    narrow = [answer.items for answer in recommender.recommend(batch)]
    for one, other in zip(whole, narrow, strict=True):
        assert [item.item_id for item in one] == [item.item_id for item in other]
        assert [item.score for item in one] == pytest.approx([item.score for item in other], abs=1e-5)


def test_the_items_of_a_batch_are_those_of_all_its_filters() -> None:
    bits = np.packbits(np.array([[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]], dtype=np.uint8), axis=1)
    none_N = np.zeros(0, dtype=np.int64)

    def found(rows: list[int], begin: int, end: int) -> list[int] | None:
        question = Question(
            past=None,
            blocked_row_N=none_N,
            blocked_item_N=none_N,
            k=1,
            filtered_row_F=np.array(rows),
            filter_F=np.arange(len(rows)),
            filter_PI=bits,
        )
        items = retrieval.allowed(question, begin, end)
        return None if items is None else items.tolist()

    assert found([0, 1], 0, 2) == [1, 3, 4]
    assert found([0, 1], 1, 2) == [3, 4]
    assert found([0], 0, 2) is None  # row 1 may get anything


@settings(deadline=None, max_examples=60)
@given(columns=st.integers(70, 900), k=st.integers(1, 5), seed=st.integers(0, 99), few=st.integers(0, 900))
def test_the_best_of_blocks_are_the_best_of_all(columns: int, k: int, seed: int, few: int) -> None:
    torch.manual_seed(seed)
    score_BI = torch.randn(3, columns)
    score_BI[1, : min(few, columns)] = float("-inf")
    item_BK, score_BK = best(score_BI, k)
    assert torch.equal(score_BK, score_BI.topk(k).values)
    assert torch.equal(score_BI.gather(1, item_BK), score_BK)


def test_a_batch_in_pieces_gives_the_same_answers(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    even = Filters(categories=CategoryFilter(any=["even"]))
    batch = [
        Request(k=5, history=(f"i{number}",), filters=even if number % 3 == 0 else None, exclude=(f"i{number + 1}",),
                item_boosts=(("i50", 9.0),) if number % 2 else ())
        for number in range(1, 9)
    ]  # fmt: skip
    whole = [answer.items for answer in recommender.recommend(batch)]
    monkeypatch.setattr(retrieval, "MAX_SCORES", 2 * N_ITEMS + 2)  # two rows at a time
    pieces = [answer.items for answer in recommender.recommend(batch)]
    for one, other in zip(whole, pieces, strict=True):
        assert [item.item_id for item in one] == [item.item_id for item in other]


def test_an_int8_table_is_rescored_exactly(events: EventStore, tmp_path: Path) -> None:
    """The order is that of float32 products with the table's rows, not of products with a rounded query."""
    bundle = make_bundle(tmp_path / "int8", table="int8")
    recommender = Recommender(bundle, events)
    network = bundle.network()
    with torch.inference_mode():
        h_BD = network(History(torch.tensor([[7, 9]])))[:, -1]
        score_I = (network.head.query(h_BD) @ network.keys().t())[0]
    score_I = score_I.clone()
    score_I[[0, 7, 9, 12]] = -9e9
    score_I[13] += math.log(4.0)
    request = Request(k=30, history=("i7", "i9"), exclude=("i12",), item_boosts=(("i13", 4.0),))
    (answer,) = recommender.recommend([request])
    assert [item.item_id for item in answer.items] == [f"i{index}" for index in score_I.topk(30).indices.tolist()]
    assert [item.score for item in answer.items] == pytest.approx(score_I.topk(30).values.tolist(), abs=1e-4)


class Reversed(Ranker):
    """A stage of somebody else: the worst of the candidates first."""

    def rank(self, query_BD: Tensor, item_BK: Tensor, score_BK: Tensor, question: Question) -> tuple[Tensor, Tensor]:
        item_BK, score_BK = super().rank(query_BD, item_BK, score_BK, question)
        return item_BK.flip(1), score_BK.flip(1)


class NoStage:
    """Has no method that a stage needs."""


def test_a_stage_is_replaced_by_its_import_path(
    bundle: Bundle, events: EventStore, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("shop_stages")
    module.Reversed = Reversed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop_stages", module)
    config = StagesConfig(classes={"rank": "shop_stages:Reversed"})
    check_stages(config)
    reversed_ = ids(Recommender(bundle, events, stages=config), Request(k=59, history=("i7",)))
    assert reversed_ == list(reversed(ids(recommender, Request(k=59, history=("i7",)))))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"ranks": "a:B"}, "there is no stage 'ranks'; did you mean 'rank'"),
        ({"rank": "no_such_module:Ranker"}, r"stages\.rank is 'no_such_module:Ranker'.*cannot be imported"),
        ({"rank": "elasticrec.serving.ranking:Rankr"}, "has no 'Rankr'; did you mean 'Ranker'"),
        ({"rank": "elasticrec.serving.ranking"}, "give 'module:Class'"),
        ({"rank": ":Ranker"}, "give 'module:Class'"),
        ({"encode": "elasticrec.serving.ranking:Ranker"}, "no class with a method 'encode'"),
        ({"rank": "elasticrec.serving.setup:STAGES"}, "no class with a method 'rank'"),
    ],
)
def test_a_wrong_import_path_is_told_before_the_start(classes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stages(StagesConfig(classes=classes))


def test_every_stage_of_ours_is_one() -> None:
    check_stages(StagesConfig())
    assert list(STAGES) == ["history", "encode", "retrieve", "rank", "postprocess"]


@pytest.mark.parametrize("wrong", [{"debias": -1.0}, {"freshness": 99.0}, {"half_life_days": 0.0}])
def test_impossible_priors_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be 0 to 2"):
        replace(PriorConfig(), **wrong)
