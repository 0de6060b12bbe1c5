"""A user's mistake is one message and status 2; it destroys nothing, and no answer is silently that of other items."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.artifact.items import check_same_items, translation
from elasticrec.cli import connection, serve
from elasticrec.cli.main import explain, run
from elasticrec.cli.options import parse
from elasticrec.compression.space import SweepConfig
from elasticrec.compression.sweep import sweep
from elasticrec.data.cluster import require_listening
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
    (tmp_path / "timed.yaml").write_text("network: {encoder: {time: {}}}\n")
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


def test_an_export_to_another_place_than_a_local_disk_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(home.rglob("*"))
    assert run(["bundle", "export", "bundle", "--out", "fsspec+memory://b/out", "--format", "pt2"]) == 2
    assert "error: 'fsspec+memory://b/out' is not on a local disk; export to a folder here" in capsys.readouterr().err
    assert sorted(home.rglob("*")) == before


def _no_cluster(*_given: Any) -> None:
    raise AssertionError("a cluster was to be started")


COMPRESS = ["compress", "bundle", "--data", "store", "--out", "small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nope"], "'nope' is not a prepared data set"),
        (["train", "--data", "store", "--config", "timed.yaml"], "network.encoder.time reads times"),
        (["compress", "nope", "--data", "store", "--out", "small"], "nope"),
        (["compress", "bundle", "--data", "newer", "--out", "small"], "item 1 is 'a' in the bundle and 'z' in 'newer'"),
        ([*COMPRESS, "--budget", "foo"], "foo"),
        ([*COMPRESS, "--space", "nope.yaml"], "nope.yaml"),
        (["compress", "bundle", "--data", "store", "--out", "s3://"], "'s3://' names no bucket"),
        (["serve", "run", "bundle", "--keys", "nope.json"], "nope.json"),
        (["serve", "run", "bundle", "--replicas", "0"], "replicas is '0': Input should be greater than or equal to 1"),
        (["serve", "run", "bundle", "--events", "foo://x"], "'foo:…'; give redis://, rediss:// (TLS) or unix://"),
    ],
)
def test_a_mistake_is_told_before_a_cluster_starts(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for module in (connection, serve):
        monkeypatch.setattr(module, "local_cluster", _no_cluster)
    monkeypatch.setattr(serve, "require_free", lambda _port: None)
    before = sorted(home.rglob("*"))
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "the address of Ray's dashboard"),
        ("127.0.0.1", "no address of a Ray cluster; give HOST:PORT"),
        ("nonsense", "no address of a Ray cluster; give HOST:PORT"),
        ("h:port", "no address of a Ray cluster"),
        ("h:0", "no address of a Ray cluster"),
        ("[::1", "no address of a Ray cluster"),
        ("head:6379/x", "no address of a Ray cluster"),
        ("ray://head", "no address of a Ray cluster"),
        ("127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
        ("a..b:6379", "no Ray cluster answers at 'a..b:6379'"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at 'ray://127.0.0.1:1'"),
    ],
)
def test_a_wrong_address_of_a_cluster_is_told_at_once(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    assert run(["registry", "publish", "bundle", "--name", "n", "--root", "registry"]) == 0
    capsys.readouterr()
    prepare = ["data", "prepare", "--interactions", "log.csv", "--out", "prepared", "--user", "user_id"]
    start_s = time.monotonic()
    assert run([*prepare, "--engine", "ray", "--address", address]) == 2
    by_option = capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert run(["registry", "promote", "--name", "n", "--version", "1", "--root", "registry"]) == 2
    by_environment = capsys.readouterr().err
    for told in (by_option, by_environment):
        assert message in told
        assert told.count("\n") == 1
    assert time.monotonic() - start_s < 30
    monkeypatch.delenv("RAY_ADDRESS")
    assert run(["registry", "list", "--root", "registry"]) == 0
    assert "production" not in capsys.readouterr().out
    assert run(["registry", "promote", "--name", "n", "--version", "1", "--root", "registry"]) == 0  # nobody holds it


def test_an_address_at_which_something_listens_is_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"localhost:{port}", f"ray://127.0.0.1:{port}/"):
            require_listening(address)
    require_listening("anyscale://somewhere")  # a plug-in knows


@pytest.mark.parametrize("refused", ["log.csv", "/proc/x", "~nobody-of-that-name/x"])
def test_a_home_of_jobs_that_can_be_no_folder_is_told(home: Path, refused: str) -> None:
    done = job_at(refused, home)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ELASTICREC_HOME: ")
    assert refused in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("told", "meant"), [("", "home/elasticrec"), ("~/mine", "home/mine"), ("here", "here")])
def test_the_home_of_jobs_is_an_absolute_folder(home: Path, told: str, meant: str) -> None:
    done = job_at(told, home)
    assert done.returncode == 0, done.stderr
    assert f"relative paths start at {home / meant} (ELASTICREC_HOME)" in done.stdout
    assert (home / meant).is_dir()


def job_at(told: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A job that lists a registry, in this folder, with this ELASTICREC_HOME; the user's home is `home` in it."""
    code = "import sys; from jobs import run_job; sys.exit(run_job(['registry', 'list']))"
    places = os.pathsep.join([str(JOBS.parents[1]), str(JOBS.parents[1] / "platform")])
    env = os.environ | {"ELASTICREC_HOME": told, "HOME": str(folder / "home"), "PYTHONPATH": places}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


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
