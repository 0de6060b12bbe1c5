"""What a sweep tries, and how two networks are compared user by user."""

import math
from pathlib import Path

import numpy as np
import pytest

from elasticrec.artifact.location import locate
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.paired import paired
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table
from elasticrec.compression.recipe import Recipe, label
from elasticrec.compression.record import claim, folder_name
from elasticrec.compression.space import Axis, Optuna, SweepConfig, combinations
from elasticrec.compression.train import watched_metric
from elasticrec.config import from_mapping, to_mapping
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig

LINEAR = Axis(name="linear", choices=((), (Int8Linear(),)))
TABLE = Axis(name="table", choices=((), (Int8Table(),), (Int4Table(),)))


def test_a_folder_whose_claim_was_cut_off_is_claimed_again(tmp_path: Path) -> None:
    (tmp_path / "sweep.json.partial-123").write_text("{")
    claim(locate(tmp_path), {"teacher": "t"})
    claim(locate(tmp_path), {"teacher": "t"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").touch()
    with pytest.raises(ConfigError, match=r"holds 'photo.png' already"):
        claim(locate(tmp_path / "other"), {"teacher": "t"})


def test_students_are_chosen_by_a_metric_that_is_measured() -> None:
    assert watched_metric(EvaluationConfig(ks=(5, 20))) == "ndcg@5"
    assert watched_metric(EvaluationConfig(ks=(5, 10))) == "ndcg@10"


def names(config: SweepConfig) -> list[str]:
    return [label(recipe) for recipe in config.listed]


def test_axes_are_combined_in_their_order() -> None:
    assert [label(recipe) for recipe in combinations((LINEAR, TABLE))] == [
        "float32",
        "int8_table",
        "int4_table",
        "int8_linear",
        "int8_linear+int8_table",
        "int8_linear+int4_table",
    ]


def test_listed_recipes_come_before_those_of_axes_and_none_comes_twice() -> None:
    config = SweepConfig(recipes=((BFloat16Table(),), (Int8Table(),)), axes=(TABLE,))
    assert names(config) == ["bfloat16_table", "int8_table", "float32", "int4_table"]
    assert config.trials == 4


def test_without_a_word_nothing_is_trained() -> None:
    assert names(SweepConfig())[0] == "float32"
    assert not any("distil" in name or "prune" in name for name in names(SweepConfig()))


def test_a_search_tries_listed_recipes_and_so_many_more() -> None:
    config = SweepConfig(recipes=((),), axes=(LINEAR, TABLE), search=Optuna(trials=5))
    assert names(config) == ["float32"]
    assert config.trials == 6


def test_a_space_is_read_as_it_was_written() -> None:
    config = SweepConfig(recipes=((Int8Linear(activations="none"), Int4Table()),), axes=(TABLE,))
    assert from_mapping(SweepConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"recipes": [[{"kind": "int5_table"}]]}, "int5_table.*did you mean 'int[48]_table'"),
        ({"recipes": [[{"kind": "int8_table"}], [{"kind": "int8_table"}]]}, "'int8_table' is there twice"),
        ({"axes": [{"name": "table", "choices": []}]}, "axis 'table' has no choices"),
        ({"search": {"kind": "optuna"}}, "combines axes and there are none"),
        ({"asha": {"reduction": 1}}, "reduction > 1"),
        ({"budget": "small"}, "cannot be read"),
    ],
)
def test_mistakes_are_told(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(SweepConfig, raw)


def test_names_of_folders_stay_short_and_apart() -> None:
    long: Recipe = (Int8Linear(),) * 20
    assert len(folder_name(long)) < 120
    assert folder_name(long) != folder_name((*long, Int8Table()))
    assert folder_name((Int8Table(),)) == "int8_table"


def test_a_paired_difference_by_hand() -> None:
    """NDCG of rank 0 is 1, of rank 2 it is 1/2, of rank 20 it is 0."""
    config = EvaluationConfig(ks=(10,))
    teacher_C, student_C = np.array([0, 0, 2, 20]), np.array([0, 2, 2, 20])
    found = paired(student_C, teacher_C, config)
    error = math.sqrt(0.0625 / 4)  # of (0, -1/2, 0, 0): variance 1/16
    assert found["ndcg@10_diff"] == pytest.approx(-0.125)
    assert found["ndcg@10_diff_low"] == pytest.approx(-0.125 - 1.959964 * error)
    assert found["ndcg@10_diff_high"] == pytest.approx(-0.125 + 1.959964 * error)
    assert found["ndcg@10_loss"] == pytest.approx(0.125 / 0.625)
    assert found["hr@10_diff"] == 0


def test_the_same_ranks_differ_by_nothing() -> None:
    rank_C = np.array([0, 5, 99])
    assert set(paired(rank_C, rank_C, EvaluationConfig()).values()) == {0.0}
