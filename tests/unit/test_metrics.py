"""Ranks and metrics against tables made by hand and against a slow reference that follows the definitions."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elasticrec.data.sequences import Sequences, write_store
from elasticrec.data.split import Cases, LeaveOneOut, SplitData, split
from elasticrec.errors import ConfigError, ElasticRecError
from elasticrec.evaluation import metrics, ranking
from elasticrec.evaluation.baselines import FixedOrder, baselines, most_recent, popularity
from elasticrec.evaluation.quality import measure
from elasticrec.evaluation.ranking import (
    MISS,
    EvaluationConfig,
    Ranking,
    evaluate,
    histories,
    rank,
    rank_metrics,
    summarize,
    training_counts,
)
from elasticrec.model.history import History
from elasticrec.training.row_shards import own_rows


def sequences_of(*users: list[int], times: list[int] | None = None) -> Sequences:
    return Sequences(
        item_E=np.array([item for user in users for item in user], dtype=np.int32),
        offset_U1=np.cumsum([0, *map(len, users)], dtype=np.int64),
        time_E=None if times is None else np.array(times, dtype=np.int64),
    )


def fixed(*scores: float) -> FixedOrder:
    """Scores of items 1, 2, …; that of the padding is the highest, and must not matter."""
    return FixedOrder(torch.tensor([99.0, *scores]))


class ByLastItem:
    """Scores that depend on the newest event: one row for each item."""

    def __init__(self, score_II: Tensor) -> None:
        self.score_II = score_II

    def scores(self, history: History) -> Tensor:
        return self.score_II[history.item_BT[:, -1].long()]


# Ranks 0, 2, 9, 10 and a miss, by hand.
RANKS = np.array([0, 2, 9, 10, MISS])
TABLE = {
    "hr@1": 1 / 5,
    "hr@3": 2 / 5,
    "hr@10": 3 / 5,
    "ndcg@1": 1 / 5,
    "ndcg@3": (1 + 0.5) / 5,  # log2(4) = 2
    "ndcg@10": (1 + 0.5 + 1 / math.log2(11)) / 5,
    "mrr@1": 1 / 5,
    "mrr@3": (1 + 1 / 3) / 5,
    "mrr@10": (1 + 1 / 3 + 1 / 10) / 5,
}
ERRORS = {
    "hr@3": math.sqrt((2 * 0.6**2 + 3 * 0.4**2) / 4 / 5),
    "mrr@1": math.sqrt((0.8**2 + 4 * 0.2**2) / 4 / 5),
}


def test_rank_metrics_by_hand() -> None:
    means, errors = rank_metrics(RANKS, EvaluationConfig(ks=(1, 3, 10)))
    assert means == pytest.approx(TABLE)
    assert errors.keys() == means.keys()
    assert {name: errors[name] for name in ERRORS} == pytest.approx(ERRORS)


def test_coverage_and_novelty_by_hand() -> None:
    top_CK = np.array([[1, 2, 0], [1, 3, 0]])  # 0: nothing more was allowed
    assert metrics.coverage(top_CK, n_items=6) == 3 / 6
    count_I = np.array([0, 4, 2, 0, 1, 1, 0])
    # shares 4/8, 2/8 and, for the item that nobody trained on, 1/8
    assert metrics.novelty(top_CK, count_I) == pytest.approx((1 + 2 + 1 + 3) / 4)
    assert metrics.novelty(np.zeros((2, 3), dtype=np.int64), count_I) == 0


def test_standard_error_by_hand() -> None:
    assert metrics.standard_error(np.array([1.0, 0.0, 0.0, 1.0])) == pytest.approx(math.sqrt(1 / 3 / 4))
    assert metrics.standard_error(np.array([0.7])) == 0


def test_summary_cuts_the_list_at_each_k() -> None:
    one = Ranking(rank_C=np.array([1]), top_CK=np.array([[2, 1]]), score_CK=np.zeros((1, 2), dtype=np.float32))
    report = summarize(one, EvaluationConfig(ks=(1, 2)), count_I=np.array([0, 3, 1, 0]))
    assert report.cases == 1
    assert (report.metrics["coverage@1"], report.metrics["coverage@2"]) == pytest.approx((1 / 3, 2 / 3))
    assert (report.metrics["novelty@1"], report.metrics["novelty@2"]) == pytest.approx((2, (2 - math.log2(0.75)) / 2))
    assert set(report.standard_errors) == {f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (1, 2)}


def ranking_of(scorer: FixedOrder | ByLastItem, sequences: Sequences, **config: object) -> Ranking:
    cases = split(LeaveOneOut(), sequences).test
    return rank(scorer, sequences, cases, EvaluationConfig(**{"ks": (3,)} | config), max_length=4)  # type: ignore[arg-type]


def test_equal_scores_go_to_the_smaller_index() -> None:
    #        item:    1  2  3  4  5  6
    scorer = fixed(*[1, 5, 5, 5, 5, 0])
    sequences = sequences_of([6, 1, 2], [6, 1, 4], [6, 1, 5])
    ranking = ranking_of(scorer, sequences)
    assert ranking.rank_C.tolist() == [0, 2, 3]
    assert ranking.top_CK.tolist() == [[2, 3, 4]] * 3


def test_the_list_and_the_ranks_agree_when_everything_is_equal() -> None:
    n_items = 400
    sequences = sequences_of(*([399, 400, item] for item in range(1, 60)))
    ranking = ranking_of(FixedOrder(torch.zeros(n_items + 1)), sequences, ks=(50,))
    assert ranking.rank_C.tolist() == list(range(59))
    assert (ranking.top_CK == np.arange(1, 51)).all()


def test_seen_items_are_removed_or_kept() -> None:
    scorer = fixed(6, 5, 4, 3, 2, 1)
    sequences = sequences_of([1, 3, 5])
    removed, kept = ranking_of(scorer, sequences), ranking_of(scorer, sequences, remove_seen=False)
    assert (removed.rank_C.tolist(), removed.top_CK.tolist()) == ([2], [[2, 4, 5]])
    assert (kept.rank_C.tolist(), kept.top_CK.tolist()) == ([4], [[1, 2, 3]])


def test_what_lies_before_the_scorers_window_is_seen_too() -> None:
    scorer = fixed(6, 5, 4, 3, 2, 1)
    assert ranking_of(scorer, sequences_of([1, 2, 3, 2, 3, 2, 3, 2, 6])).top_CK.tolist() == [[4, 5, 6]]


@pytest.mark.parametrize("k", [1, 3, 200])
def test_an_answer_that_was_seen_is_a_miss_at_every_k(k: int) -> None:
    sequences = sequences_of([1, 2, 1])
    report = evaluate(
        fixed(3, 2, 1), sequences, split(LeaveOneOut(), sequences).test, EvaluationConfig(ks=(k,)),
        max_length=4, count_I=np.array([0, 1, 1, 1]),
    )  # fmt: skip
    assert (report.metrics[f"hr@{k}"], report.metrics[f"ndcg@{k}"], report.metrics[f"mrr@{k}"]) == (0, 0, 0)


def test_a_list_longer_than_the_catalogue_ends_with_zeros() -> None:
    ranking = ranking_of(fixed(3, 2, 1), sequences_of([1, 1, 2]), ks=(1, 7))
    assert ranking.top_CK.tolist() == [[2, 3, 0, 0, 0, 0, 0]]


def test_no_cases_give_no_ranks() -> None:
    sequences = sequences_of([1, 2, 3])
    nobody = split(LeaveOneOut(), sequences).test.part(1, 2)  # the second of two workers, one case
    ranking = rank(fixed(3, 2, 1), sequences, nobody, EvaluationConfig(ks=(2,)), max_length=4)
    assert (ranking.rank_C.shape, ranking.top_CK.shape) == ((0,), (0, 2))


def test_scores_that_are_no_numbers_are_told() -> None:
    with pytest.raises(ElasticRecError, match="the model's scores hold NaN; it has diverged"):
        ranking_of(fixed(1, float("nan"), 0), sequences_of([1, 2, 3]))


@pytest.mark.parametrize("config", [{"ks": ()}, {"ks": (0, 1)}, {"batch_cases": 0}])
def test_impossible_settings_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        EvaluationConfig(**config)  # type: ignore[arg-type]


def test_progress_counts_cases() -> None:
    sequences = sequences_of(*[[1, 2, 3]] * 5)
    done: list[int] = []
    cases = split(LeaveOneOut(), sequences).test
    rank(fixed(3, 2, 1), sequences, cases, EvaluationConfig(batch_cases=2), max_length=4, advance=done.append)
    assert done == [2, 2, 1]


def test_histories_are_right_aligned_and_hold_the_newest() -> None:
    sequences = sequences_of([1, 2, 3, 4, 5], [6, 7, 8])
    cases = split(LeaveOneOut(), sequences)
    assert histories(sequences, cases.validation, 4).item_BT.tolist() == [[0, 1, 2, 3], [0, 0, 0, 6]]
    assert histories(sequences, cases.test, 3).item_BT.tolist() == [[2, 3, 4], [0, 6, 7]]


def slow_ranking(
    score_II: Tensor, sequences: Sequences, cases: Cases, k: int, remove_seen: bool
) -> tuple[list[int], list[list[int]]]:
    """By the definitions, one case after the other."""
    ranks, tops = [], []
    for start, end, target in zip(cases.start_C, cases.end_C, cases.target_C, strict=True):
        seen = set(sequences.item_E[start:end].tolist()) if remove_seen else set()
        score_of = score_II[int(sequences.item_E[end - 1])].tolist()
        allowed = [item for item in range(1, len(score_of)) if item not in seen]
        order = sorted(allowed, key=lambda item: (-score_of[item], item))
        answer = int(sequences.item_E[target])
        ranks.append(order.index(answer) if answer in order else MISS)
        tops.append((order + [0] * k)[:k])
    return ranks, tops


@st.composite
def questions(draw: st.DrawFn) -> tuple[Sequences, Tensor]:
    """Histories, and scores by the newest event with many ties."""
    n_items = draw(st.integers(2, 12))
    item = st.integers(1, n_items)
    users = draw(st.lists(st.lists(item, min_size=3, max_size=8), min_size=1, max_size=8))
    row = st.lists(st.integers(-2, 2), min_size=n_items + 1, max_size=n_items + 1)
    rows = draw(st.lists(row, min_size=n_items + 1, max_size=n_items + 1))
    return sequences_of(*users), torch.tensor(rows, dtype=torch.float32)


@given(question=questions(), k=st.integers(1, 15), batch=st.integers(1, 9), remove_seen=st.booleans())
def test_ranks_and_lists_are_those_of_the_slow_reference(
    question: tuple[Sequences, Tensor], k: int, batch: int, remove_seen: bool
) -> None:
    sequences, score_II = question
    config = EvaluationConfig(ks=(k,), remove_seen=remove_seen, batch_cases=batch)
    cases = split(LeaveOneOut(), sequences).test
    ranking = rank(ByLastItem(score_II), sequences, cases, config, max_length=4)
    ranks, tops = slow_ranking(score_II, sequences, cases, k, remove_seen)
    assert ranking.rank_C.tolist() == ranks
    assert ranking.top_CK.tolist() == tops


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_the_size_of_a_batch_does_not_matter(batch: int) -> None:
    random = np.random.default_rng(0)
    sequences = sequences_of(*(random.integers(1, 31, random.integers(3, 12)).tolist() for _ in range(65)))
    scorer = ByLastItem(torch.from_numpy(random.normal(size=(31, 31)).round(1)))
    cases = split(LeaveOneOut(), sequences).test
    count_I = np.arange(31)
    one, other = (
        evaluate(scorer, sequences, cases, EvaluationConfig(batch_cases=size), max_length=3, count_I=count_I)
        for size in (256, batch)
    )
    assert one == other
    assert one.cases == 65


class Columns:
    """One of several workers, here threads: it scores some of the items and meets the others."""

    def __init__(self, scorer: ByLastItem, own: range, told: list[Tensor], barrier: threading.Barrier) -> None:
        self._scorer, self._own, self._told, self._barrier = scorer, own, told, barrier
        self.first = own.start

    def scores(self, history: History) -> Tensor:
        return self._scorer.scores(history)[:, self._own.start : self._own.stop]

    def largest(self, value: Tensor) -> Tensor:
        return self._all(value).amax(dim=0)

    def total(self, value: Tensor) -> Tensor:
        return self._all(value).sum(dim=0)

    def _all(self, value: Tensor) -> Tensor:
        self._told.append(value)
        self._barrier.wait(timeout=20)
        everyone = torch.stack(list(self._told))
        if self._barrier.wait(timeout=20) == 0:
            self._told.clear()
        self._barrier.wait(timeout=20)
        return everyone


def ranks_of_parts(
    scorer: ByLastItem, sequences: Sequences, config: EvaluationConfig, n_items: int, parts: int
) -> list[list[int]]:
    told: list[Tensor] = []
    barrier, cases = threading.Barrier(parts), split(LeaveOneOut(), sequences).test
    columns = [Columns(scorer, own_rows(n_items + 1, part, parts), told, barrier) for part in range(parts)]

    def ranks(part: Columns) -> list[int]:
        return rank(part, sequences, cases, config, max_length=3, tops=False, part=part).rank_C.tolist()

    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(ranks, columns))


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("remove_seen", [True, False])
def test_workers_that_score_some_items_each_find_the_ranks_of_one_that_scores_all(
    parts: int, remove_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many ties, and batches that are cut by the largest part."""
    random = np.random.default_rng(0)
    sequences = sequences_of(*(random.integers(1, 31, random.integers(3, 12)).tolist() for _ in range(65)))
    scorer = ByLastItem(torch.from_numpy(random.normal(size=(31, 31)).round(1)))
    config = EvaluationConfig(remove_seen=remove_seen, batch_cases=20)
    expected = ranking_of(scorer, sequences, remove_seen=remove_seen)
    assert any(place == MISS for place in expected.rank_C) == remove_seen
    monkeypatch.setattr(ranking, "SCORE_BYTES", 20 * 70)
    assert ranks_of_parts(scorer, sequences, config, 30, parts) == [expected.rank_C.tolist()] * parts


def test_all_workers_tell_of_scores_of_one_that_are_no_numbers() -> None:
    score_II = torch.zeros(31, 31)
    score_II[:, 29] = float("nan")
    with pytest.raises(ElasticRecError, match="hold NaN"):
        ranks_of_parts(ByLastItem(score_II), sequences_of([1, 2, 3]), EvaluationConfig(), 30, 3)


def test_scores_of_a_large_catalogue_are_held_for_a_few_cases_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more scores than the budget, and in sum the same ranks."""
    n_items, sizes = 500, []
    sequences = sequences_of(*([user % n_items + 1, 2, user * 7 % n_items + 1] for user in range(30)))

    class Counting(ByLastItem):
        def scores(self, history: History) -> Tensor:
            sizes.append(len(history.item_BT))
            return super().scores(history)

    scorer = Counting(torch.rand(n_items + 1, n_items + 1, generator=torch.Generator().manual_seed(0)))
    whole = ranking_of(scorer, sequences)
    assert max(sizes) == 30
    sizes.clear()
    monkeypatch.setattr(ranking, "SCORE_BYTES", 8 * 20 * (n_items + 1))
    parts = ranking_of(scorer, sequences, batch_cases=20)
    assert sizes == [1, 8, 8, 4, 8, 2]
    assert (parts.rank_C == whole.rank_C).all()
    assert (parts.top_CK == whole.top_CK).all()


# Three users; by leave-one-out they train on 1 1 2 | 1 3 | 2 2, the last one being too short to be asked anything.
USERS = ([1, 1, 2, 4, 4], [1, 3, 4, 5], [2, 2])
TIMES = [10, 20, 30, 90, 91, 40, 30, 92, 93, 15, 16]


def by_hand(times: list[int] | None = None) -> tuple[Sequences, SplitData]:
    sequences = sequences_of(*USERS, times=times)
    return sequences, split(LeaveOneOut(), sequences)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_training_counts_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(ranking, "_CHUNK_USERS", chunk)
    sequences, parts = by_hand()
    assert training_counts(sequences, parts, n_items=6).tolist() == [0, 3, 3, 1, 0, 0, 0]


def assert_order(score_I: torch.Tensor, groups: list[set[int]]) -> None:
    """Best items first; within a group any order, but never a tie."""
    order = torch.argsort(score_I, descending=True).tolist()
    assert len(set(score_I.tolist())) == len(order)
    for group in groups:
        assert set(order[: len(group)]) == group
        order = order[len(group) :]


def test_ties_of_a_baseline_are_not_broken_by_the_index() -> None:
    """Items are numbered by all events, so the smaller index among equals is the one with more answers."""
    sequences = sequences_of(*[[item, item % 100 + 1, 1] for item in range(1, 101)])
    score_I = popularity(sequences, split(LeaveOneOut(), sequences), 100).score_I[1:]
    falling = (score_I[:-1] > score_I[1:]).double().mean()
    assert 0.35 < falling < 0.65


def test_popularity_by_hand() -> None:
    sequences, parts = by_hand()
    score_BI = popularity(sequences, parts, 6).scores(History(torch.zeros(2, 4)))
    assert_order(score_BI[0], [{1, 2}, {3}, {0, 4, 5, 6}])
    assert score_BI[0].tolist() == score_BI[1].tolist()


def test_most_recent_by_hand() -> None:
    sequences, parts = by_hand(TIMES)
    # last touched in training: item 1 at 40, items 2 and 3 at 30, the others never
    assert_order(most_recent(sequences, parts, 6).score_I, [{1}, {2, 3}, {0, 4, 5, 6}])


def test_most_recent_without_times_takes_the_place_in_the_history() -> None:
    sequences, parts = by_hand()
    # latest place: item 1 is second of the first user, 2 is third there, 3 is second of the second user
    assert_order(most_recent(sequences, parts, 6).score_I, [{2}, {1, 3}, {0, 4, 5, 6}])


def test_most_recent_tells_seconds_of_this_century_apart() -> None:
    sequences = sequences_of([1, 2, 3, 3, 3], times=[1_700_000_000, 1_700_000_001, 1_700_000_002, 0, 0])
    score_I = most_recent(sequences, split(LeaveOneOut(), sequences), 3).scores(History(torch.zeros(1, 1)))[0].float()
    assert score_I[0] < score_I[1] < score_I[2] < score_I[3]


def test_baselines_do_not_look_at_the_answers() -> None:
    sequences, parts = by_hand(TIMES)
    changed = sequences_of([1, 1, 2, 6, 5], [1, 3, 5, 6], [2, 2], times=TIMES)
    for name, scorer in baselines(changed, split(LeaveOneOut(), changed), 6).items():
        before = baselines(sequences, parts, 6)[name].scores(History(torch.zeros(1, 1)))
        assert torch.equal(before, scorer.scores(History(torch.zeros(1, 1))))


def test_quality_reports_both_parts_and_the_baselines(tmp_path: Path) -> None:
    items = pa.table({"item_index": list(range(1, 7)), "item_id": [str(item) for item in range(1, 7)]})
    users = pa.table({"user_index": [0, 1, 2], "user_id": ["a", "b", "c"]})
    store = write_store(tmp_path / "store", sequences_of(*USERS, times=TIMES), users, items, command="test")
    config = EvaluationConfig(ks=(1, 5))
    quality = measure(fixed(1, 2, 3, 9, 8, 7), store, LeaveOneOut(), config, max_length=4)
    mapping = quality.as_mapping()
    assert set(mapping) == {"validation", "test", "test_standard_errors", "test_cases", "baselines"}
    names = {f"{name}@{k}" for name in ("hr", "ndcg", "mrr", "coverage", "novelty") for k in (1, 5)}
    assert set(mapping["validation"]) == set(mapping["test"]) == names
    assert set(mapping["baselines"]) == {"popularity", "most_recent"}
    assert all(set(table) == names for table in mapping["baselines"].values())
    assert mapping["test_cases"] == 2
    # Validation asks for 4 and 4, which this scorer puts first. The test asks for 4, by then seen, and 5, then first.
    assert (mapping["validation"]["hr@1"], mapping["test"]["hr@1"]) == (1.0, 0.5)
    assert mapping["test_standard_errors"]["hr@1"] == pytest.approx(0.5)
