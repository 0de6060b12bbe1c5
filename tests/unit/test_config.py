"""Configs: what is read, what is refused with which words, and that writing and reading give the same value."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.config import from_mapping, load, to_mapping
from elasticrec.data.plan import PlanConfig
from elasticrec.data.split import LeaveOneOut, TimeSplit
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.head import HeadConfig
from elasticrec.model.network import NetworkConfig
from elasticrec.training.optimizer import OptimizerConfig
from elasticrec.training.run import CheckpointConfig, ElasticConfig, RunConfig, ValidationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Square:
    kind: ClassVar[str] = "square"
    side: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle:
    kind: ClassVar[str] = "circle"
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    title: str
    shape: Square | Circle = field(default_factory=Square)
    only: Square = field(default_factory=Square)
    layers: tuple[Square, ...] = ()
    size: tuple[int, float] = (1, 1.0)
    names: list[str] = field(default_factory=list)
    mode: Literal["plain", "fancy"] = "plain"
    limit: int | None = None
    size_or_name: int | str = 0
    where: Path = Path("here")
    visible: bool = True
    free: Any = None


def picture(**raw: Any) -> Picture:
    return from_mapping(Picture, {"title": "t"} | raw)


def test_every_sort_of_field_is_read() -> None:
    read = picture(
        shape={"kind": "circle", "radius": 2},
        only={"kind": "square", "side": 3},
        layers=[{"side": 1}, {}],
        size=[3, 4],
        names=["a", "b"],
        mode="fancy",
        limit=5,
        size_or_name="big",
        where="there/file",
        visible=False,
        free={"any": ["thing"]},
    )
    assert read == Picture(
        title="t",
        shape=Circle(radius=2.0),
        only=Square(side=3.0),
        layers=(Square(side=1.0), Square()),
        size=(3, 4.0),
        names=["a", "b"],
        mode="fancy",
        limit=5,
        size_or_name="big",
        where=Path("there/file"),
        visible=False,
        free={"any": ["thing"]},
    )
    assert isinstance(read.size[1], float)
    assert isinstance(read.layers, tuple)
    assert picture(limit=None).limit is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"titel": "x"}, "unknown key 'titel'; did you mean 'title'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known: free, layers, limit"),
        ({3: 1}, "unknown key '3'; known: "),
        ({"only": {"sid": 1}}, "unknown key 'only.sid'; did you mean 'side'?"),
        ({"layers": [{}, {"sied": 1}]}, "unknown key 'layers[1].sied'; did you mean 'side'?"),
        ({"layers": {"side": 1}}, "'layers' must be a list, got {'side': 1}"),
        ({"names": "abc"}, "'names' must be a list, got 'abc'"),
        ({"names": ["a", 1]}, "'names[1]' must be str, got 1"),
        ({"size": [1]}, "'size' needs 2 values, got 1: [1]"),
        ({"size": [1, "x"]}, "'size[1]' must be float, got 'x'"),
        ({"shape": {"kind": "cirle", "radius": 1}}, "'shape.kind' is 'cirle'; did you mean 'circle'?"),
        ({"shape": {"radius": 1}}, "'shape.kind' is None; known: circle, square"),
        ({"shape": {"kind": ["circle"]}}, "'shape.kind' is ['circle']"),
        ({"shape": {"kind": "circle"}}, "key 'shape.radius' is required; add it"),
        ({"shape": {"kind": "square", "radius": 1}}, "unknown key 'shape.radius'; known: side"),
        ({"shape": "circle"}, "'shape' is 'circle', expected one of "),
        ({"only": {"kind": "circle"}}, "'only.kind' is 'circle'; known: square"),
        ({"only": 3}, "'only' must hold keys and values, got 3"),
        ({"mode": "fancey"}, "'mode' is 'fancey'; did you mean 'fancy'?"),
        ({"limit": "five"}, "'limit' must be int, got 'five'"),
        ({"limit": 1.5}, "'limit' must be int, got 1.5"),
        ({"limit": True}, "'limit' must be int, got True"),
        ({"only": {"side": True}}, "'only.side' must be float, got True"),
        ({"only": {"side": math.nan}}, "'only.side' must be float, got nan"),
        ({"only": {"side": 10**400}}, "'only.side' must be float, got 1000"),
        ({"visible": 1}, "'visible' must be bool, got 1"),
        ({"where": 1}, "'where' must be Path, got 1"),
        ({"size_or_name": [1]}, "'size_or_name' is [1], expected one of <class 'int'>, <class 'str'>"),
    ],
)
def test_what_does_not_fit_is_named_with_its_path(raw: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Picture, {"title": "t"} | raw)
    assert str(caught.value).startswith(message)


def test_a_required_key_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"^key 'title' is required; add it$"):
        from_mapping(Picture, {})


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "1.0e-3"])
def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"optimizer: {{ learning_rate: {text} }}\n", encoding="utf-8")
    assert load(RunConfig, tmp_path / "run.yaml").optimizer.learning_rate == 0.001


def test_yaml_reads_a_bare_exponent_as_text_which_is_why_it_is_converted() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds a list; it must hold keys and values"),
        (b"just words", "holds a str; it must hold keys and values"),
        (b"0", "holds a int; it must hold keys and values"),
        (b"a: [1, 2", "is not valid YAML: "),
        (b"name: \xff\xfe", "is not valid YAML: "),
        (b"name: !!python/object:os.system {}", "is not valid YAML: "),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, tmp_path / "run.yaml")
    assert str(caught.value).startswith(f"config file '{tmp_path / 'run.yaml'}' {message}")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml' does not exist; give the path of a YAML file"):
        load(RunConfig, tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(RunConfig, tmp_path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n", encoding="utf-8")
    assert load(RunConfig, tmp_path / "run.yaml") == RunConfig()


def test_a_rule_of_a_nested_config_is_told_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"split needs 0 < validation < test < 1, got 0\.9 and 0\.8"):
        from_mapping(RunConfig, {"split": {"kind": "time", "validation": 0.9, "test": 0.8}})


FRACTION = st.floats(0.01, 0.99)
RUNS = st.builds(
    RunConfig,
    name=st.text("abcXYZ019._- äß", min_size=1, max_size=12).filter(lambda name: name not in (".", "..")),
    data=st.sampled_from([Path("data"), Path("/tmp/a b/c"), Path("../up")]),
    storage=st.just(Path("runs")),
    epochs=st.integers(1, 1000),
    network=st.builds(
        NetworkConfig,
        encoder=st.builds(
            EncoderConfig,
            width=st.sampled_from([8, 16, 64]),
            blocks=st.integers(1, 4),
            max_length=st.integers(1, 200),
            dropout=st.floats(0, 0.9),
            block=st.builds(
                BlockConfig, heads=st.sampled_from([1, 2, 4]), expansion=st.floats(0.5, 4), residual_gates=st.booleans()
            ),
        ),
        head=st.builds(HeadConfig, temperature=FRACTION),
    ),
    split=st.just(LeaveOneOut()) | st.builds(TimeSplit, validation=st.floats(0.1, 0.5), test=st.floats(0.6, 0.9)),
    plan=st.builds(PlanConfig, batch_users=st.just(64), shards=st.sampled_from([8, 16]), seed=st.integers(0, 2**40)),
    optimizer=st.builds(OptimizerConfig, learning_rate=FRACTION, betas=st.tuples(FRACTION, FRACTION)),
    evaluation=st.builds(EvaluationConfig, ks=st.lists(st.integers(1, 99), max_size=4).map(lambda ks: (10, *ks))),
    validation=st.builds(ValidationConfig, every_epochs=st.integers(1, 9), metric=st.sampled_from(["hr@10", "mrr@10"])),
    checkpoint=st.builds(CheckpointConfig, interval_s=st.floats(0, 1e9), keep=st.integers(2, 9)),
    elastic=st.builds(ElasticConfig, min_workers=st.integers(1, 4), max_workers=st.integers(4, 8)),
)


@given(run=RUNS)
def test_a_run_comes_back_from_plain_values_json_and_yaml(run: RunConfig) -> None:
    plain = to_mapping(run)
    assert from_mapping(RunConfig, plain) == run
    assert from_mapping(RunConfig, json.loads(json.dumps(plain))) == run
    assert from_mapping(RunConfig, yaml.safe_load(yaml.safe_dump(plain))) == run


def test_the_configs_that_come_with_the_project_are_read() -> None:
    folder = Path(__file__).parents[2] / "configs"
    runs = {path.stem: load(RunConfig, path) for path in folder.glob("*.yaml")}
    assert runs["ml-100k"].optimizer.learning_rate == 1e-3
