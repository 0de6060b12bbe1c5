"""A user's mistake is one message and status 2; it destroys nothing, and no answer is silently that of other items."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.artifact.items import check_same_items, translation
from elasticrec.cli.main import explain, run
from elasticrec.cli.options import parse
from elasticrec.compression.space import SweepConfig
from elasticrec.compression.sweep import sweep
from elasticrec.data.prepare import PrepareConfig
from elasticrec.data.sequences import Sequences, Store, open_store, write_store
from elasticrec.errors import ConfigError, InputError
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.serving.batch import BATCH_SCHEMA, BatchRecommender
from elasticrec.serving.parts import ANSWERS

JOBS = Path(__file__).resolve().parents[2] / "jobs" / "__init__.py"
IDS = list("abcdef")
LOG = "user_id,item_id\nu,a\nu,b\nu,c\n"


def store_of(path: Path, ids: list[str], *histories: str) -> Store:
    """Items numbered as in `ids`; a history is the ids of its items."""
    events = [ids.index(item) + 1 for history in histories for item in history]
    offsets = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    users = pa.table({"user_index": range(len(histories)), "user_id": [f"u{n}" for n in range(len(histories))]})
    sequences = Sequences(item_E=np.array(events, dtype=np.int32), offset_U1=offsets)
    return write_store(path, sequences, users, items_of(ids), command="test")


def items_of(ids: list[str]) -> pa.Table:
    columns = {"item_index": list(range(1, len(ids) + 1)), "item_id": ids, "title": ids}
    return pa.table(columns | {"categories": [["x"]] * len(ids), "count": [1] * len(ids)})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle and its store, one of a newer log, and a log; the working directory of the test."""
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=4)), len(IDS))
    write_bundle(tmp_path / "bundle", network, items_of(IDS), name="letters", version="1")
    store_of(tmp_path / "store", IDS, "abc", "abcde")
    store_of(tmp_path / "newer", list("zfedcb"), "bc", "bzcde", "zz")  # as many items, others, otherwise numbered
    (tmp_path / "log.csv").write_text(LOG)
    (tmp_path / "run.yaml").write_text("ks: [7]\n")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "chosen.json").write_text('{"bundle": ')
    for name, manifest in (("old", {"schema_version": 1}), ("text", {"schema_version": "2"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


PREPARE = ["data", "prepare", "--interactions", "log.csv", "--out"]
BATCH = ["recommend-batch", "bundle", "--data", "store", "--out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "bundle", "--data", "store", "--out", "/nonexistent/q.json"], "no folder '/nonexistent'"),
        (["evaluate", "bundle", "--data", "store", "--out", "store"], "'store' is a folder"),
        (["evaluate", "bundle", "--data", "newer"], "item 1 is 'a' in the bundle and 'z' in 'newer'"),
        (["evaluate", "s3://", "--data", "store"], "'s3://' names no bucket"),
        (["evaluate", "gs://", "--data", "store"], "'gs://' names no bucket"),
        (["evaluate", "s3://?region=eu-west-1", "--data", "store"], "names no bucket"),
        (["recommend", "bundle", "--history", "a", "--k", "0"], "--k is 0"),
        ([*BATCH, "top", "--k", "0"], "--k is 0"),
        ([*BATCH, "top", "--batch-users", "0"], "--batch-users is 0"),
        ([*BATCH, "top", "--workers", "0"], "--workers is 0"),
        ([*BATCH, "bundle"], "bundle' exists and is no folder of recommendations"),
        ([*BATCH, "log.csv"], "log.csv' exists and is no folder of recommendations"),
        ([*PREPARE, "bundle"], "'bundle' exists and is no prepared data set"),
        ([*PREPARE, "log.csv"], "'log.csv' exists and is no prepared data set"),
        ([*PREPARE, "log.csv/x"], "log.csv"),
        ([*PREPARE, "/proc/foo/bar"], "'/proc/foo': No such file or directory; check the path"),
        (["data", "check", "old"], "describes no store"),
        (["data", "check", "text"], "describes no store"),
        (["data", "check", "bundle"], "describes no store"),
        (["serve", "key", "n", "--keys", "/proc/x/k"], "'/proc/x': No such file or directory"),
        (["registry", "publish", "bundle", "--name", "n", "--root", "/proc/x"], "/proc/x"),
        (["registry", "publish", "bundle", "--name", "n", "--root", "log.csv"], "log.csv"),
        (["registry", "publish", "chosen", "--name", "n"], "chosen.json' is damaged"),
    ],
)
def test_a_mistake_gives_one_message_and_destroys_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(path.relative_to(home) for path in home.rglob("*"))
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == before


def test_only_earlier_answers_are_replaced(home: Path) -> None:
    (home / "top").mkdir()
    pq.write_table(BATCH_SCHEMA.empty_table(), home / "top" / "1.parquet")
    assert ANSWERS.is_in(home / "top")
    pq.write_table(items_of(IDS), home / "top" / "items.parquet")  # somebody's table
    assert not ANSWERS.is_in(home / "top")
    (home / "top" / "items.parquet").unlink()
    (home / "top" / "deeper").mkdir()
    assert not ANSWERS.is_in(home / "top")


def test_what_the_system_refuses_is_said_with_a_way_out() -> None:
    assert explain(PermissionError(13, "Permission denied", "/x")) == (
        "'/x': Permission denied; give a place where you may read and write"
    )
    assert explain(OSError(28, "No space left on device", "/x")).startswith("'/x': No space left on device; check")
    assert explain(OSError("bare")) == "bare"


def test_other_items_are_refused_by_evaluate_and_compress(home: Path) -> None:
    bundle = open_bundle("bundle")
    check_same_items(bundle, open_store("store"))
    swapped = store_of(home / "swapped", list("abdcef"), "abc")
    with pytest.raises(InputError, match="item 3 is 'c' in the bundle and 'd' in"):
        check_same_items(bundle, swapped)
    with pytest.raises(InputError, match=r"knows 6 items, .* has 2"):
        check_same_items(bundle, store_of(home / "few", ["a", "b"], "ab"))
    with pytest.raises(InputError, match="item 3 is 'c'"):
        sweep(SweepConfig(), "bundle", home / "swapped", home / "out")
    assert not os.path.exists("out")


def test_a_bundle_answers_for_a_newer_store(home: Path) -> None:
    assert translation(open_bundle("bundle"), open_store("newer")).tolist() == [0, 0, 6, 5, 4, 3, 2]
    same = store_of(home / "same", IDS, "bc", "bcde")
    expected = pa.concat_tables(BatchRecommender("bundle", str(same.path), k=9).answers(range(2), 2)).to_pydict()
    found = pa.concat_tables(BatchRecommender("bundle", "newer", k=9).answers(range(3), 2)).to_pydict()
    assert found == expected  # and the third user, who knows nothing that the bundle knows, gets no rows
    assert set(found["user_id"]) == {"u0", "u1"}
    assert {found["item_id"][row] for row, user in enumerate(found["user_id"]) if user == "u1"} == {"a", "f"}


def test_recommend_shows_what_was_not_seen(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for data, user in (("store", "u1"), ("newer", "u1")):
        assert run(["recommend", "bundle", "--data", data, "--user", user, "--k", "9"]) == 0
        told.append(capsys.readouterr().out)
    assert "inf" not in "".join(told)
    assert [line.split()[3] for line in told[0].splitlines() if line[:1] == "│"] == ["f"]
    assert sorted(line.split()[3] for line in told[1].splitlines() if line[:1] == "│") == ["a", "f"]


@pytest.mark.parametrize("words", [["--config", "run.yaml"], ["--config=run.yaml"]])
def test_both_ways_to_name_a_config(home: Path, words: list[str]) -> None:
    assert parse(EvaluationConfig, "test", words, "").ks == (7,)
    with pytest.raises(ConfigError, match="needs the path"):
        parse(EvaluationConfig, "test", ["--config="], "")


def test_a_config_needs_only_what_no_option_gives(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "split.yaml").write_text("evaluation: {ks: [7]}\nsplit: {kind: leave_one_out}\n")
    (home / "data.yaml").write_text("data: nowhere\nevaluation: {ks: [7]}\n")
    (home / "wrong.yaml").write_text("spilt: {kind: time}\n")
    for file in ("split.yaml", "data.yaml"):
        assert run(["evaluate", "bundle", "--data", "store", "--config", file, "--out", f"{file}.json"]) == 0
        assert "ndcg@7" in json.loads((home / f"{file}.json").read_text())["test"]
    with pytest.raises(SystemExit, match="2"):
        run(["evaluate", "bundle", "--config", "split.yaml"])
    assert "--data" in capsys.readouterr().err
    assert run(["evaluate", "bundle", "--data", "store", "--config", "wrong.yaml"]) == 2
    assert "unknown key 'spilt'; did you mean 'split'" in capsys.readouterr().err


def test_what_a_file_and_the_options_give_is_checked_together(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "some.yaml").write_text("categories: shelf\nmin_user_events: 2\n")
    words = ["--config", "some.yaml", "--interactions", "log.csv", "--out", "new"]
    with pytest.raises(SystemExit, match="2"):
        parse(PrepareConfig, "test", words, "")
    assert "name columns of" in capsys.readouterr().err
    config = parse(PrepareConfig, "test", [*words, "--items", "items.csv"], "")
    expected = PrepareConfig(
        interactions=("log.csv",), out=Path("new"), categories="shelf", items=("items.csv",), min_user_events=2
    )
    assert (type(config), config) == (PrepareConfig, expected)
    (home / "whole.yaml").write_text("interactions: [log.csv]\nout: new\ncategories: shelf\n")
    with pytest.raises(ConfigError, match="name columns of an item file"):
        parse(PrepareConfig, "test", ["--config", "whole.yaml"], "")


@pytest.mark.parametrize(("ks", "shown"), [(["5", "20"], 5), (["20", "5"], 20), (["50", "10"], 10)])
def test_evaluate_shows_what_it_measured(
    home: Path, capsys: pytest.CaptureFixture[str], ks: list[str], shown: int
) -> None:
    assert run(["evaluate", "bundle", "--data", "store", "--evaluation.ks", *ks, "--out", "q.json"]) == 0
    assert set(json.loads((home / "q.json").read_text())["test"]) >= {f"hr@{k}" for k in ks}
    told = capsys.readouterr().out
    assert all(f"{name}@{shown} " in told for name in ("hr", "ndcg", "mrr", "coverage", "novelty"))


def test_what_was_measured_is_written_before_it_is_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_table: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("elasticrec.cli.evaluate.show", closed)
    assert run(["evaluate", "bundle", "--data", "store", "--out", "q.json"]) == 2
    assert "ndcg@10" in json.loads((home / "q.json").read_text())["test"]


def test_a_job_finds_its_config_in_both_ways(home: Path) -> None:
    absolute = runpy.run_path(str(JOBS))["_with_absolute_config"]
    given = ["--config", "a.yaml", "--space=b.yaml", "--out=c"]
    assert absolute(given) == ["--config", f"{home}/a.yaml", f"--space={home}/b.yaml", "--out=c"]
