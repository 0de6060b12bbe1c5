"""The steps as a user starts them: as Ray jobs on a cluster, and one by one on the command line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.main import run
from elasticrec.data.synthetic import SyntheticConfig, describe_items, generate

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "name": "tiny",
    "data": "store",
    "storage": "runs",
    "epochs": 4,
    "network": {"encoder": {"width": 16, "blocks": 1, "max_length": 20}},
    "plan": {"batch_users": 64, "shards": 4},
    "validation": {"every_epochs": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, its items and a training config; jobs' relative paths start here."""
    folder = tmp_path_factory.mktemp("home")
    config = SyntheticConfig(users=150, items=60)
    pyarrow.csv.write_csv(generate(config), folder / "log.csv")
    pq.write_table(describe_items(config), folder / "items.parquet")
    (folder / "train.yaml").write_text(yaml.safe_dump(CONFIG))
    space = {"recipes": [[], [{"kind": "int8_table"}]], "budget": "ndcg@10>=0.5*teacher"}
    (folder / "space.yaml").write_text(yaml.safe_dump(space | {"measure": {"rounds": 20}}))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=2)) as running:
        yield running


def job(cluster: LocalCluster, home: Path, module: str, *arguments: str) -> str:
    """`ray job submit --working-dir . -- python -m jobs.…`, as the README says it."""
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", "."]
    environment = json.dumps({"env_vars": {"ELASTICREC_HOME": str(home)}})
    command = [*ray, "--runtime-env-json", environment, "--", "python", "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] or done.stderr[-3000:]
    return done.stdout


def test_every_step_as_a_job(cluster: LocalCluster, home: Path) -> None:
    columns = ["--user", "user_id", "--item", "item_id", "--time", "timestamp"]
    items = ["--items", "items.parquet", "--title", "title", "--categories", "categories"]
    job(cluster, home, "jobs.prepare", "--interactions", "log.csv", *columns, *items, "--out", "store")
    # The command as the README has it: its config lies in the working directory. A small copy of it for speed:
    told = job(cluster, home, "jobs.train", "--config", str(home / "train.yaml"))
    assert "ndcg@10" in told
    bundle = home / "runs" / "tiny" / "bundle"
    assert (bundle / "manifest.json").exists()
    workers = {json.loads(line)["workers"] for line in (bundle.parent / "steps.jsonl").read_text().splitlines()}
    assert workers <= {1, 2}

    job(cluster, home, "jobs.evaluate", str(bundle), "--data", "store", "--out", "quality.json")
    quality = json.loads((home / "quality.json").read_text())
    assert quality["test"] == pytest.approx(json.loads((bundle / "manifest.json").read_text())["metrics"]["test"])

    told = job(
        cluster,
        home,
        "jobs.compress",
        str(bundle),
        "--data",
        "store",
        "--out",
        "small",
        "--space",
        str(home / "space.yaml"),
    )
    assert "chosen bundle" in told
    assert run(["registry", "publish", str(home / "small"), "--name", "tiny", "--root", str(home / "registry")]) == 0
    job(cluster, home, "jobs.promote", "--name", "tiny", "--version", "1", "--root", "registry", "--reason", "test")

    reference = "registry#tiny@production"
    job(cluster, home, "jobs.recommend_batch", reference, "--data", "store", "--out", "top", "--k", "5")
    top = pq.read_table(home / "top")
    assert top.num_rows == 150 * 5
    seen = set(
        zip(*pyarrow.csv.read_csv(home / "log.csv").select(["user_id", "item_id"]).to_pydict().values(), strict=True)
    )
    assert not seen & set(zip(top["user_id"].to_pylist(), top["item_id"].to_pylist(), strict=True))


def test_the_same_on_the_command_line(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert run(["data", "check", "store"]) == 0
    assert run(["bundle", "verify", "runs/tiny/bundle"]) == 0
    assert run(["registry", "list", "--root", "registry"]) == 0
    assert "tiny@1  production" in capsys.readouterr().out
    log = pyarrow.csv.read_csv("log.csv")
    user, item = log["user_id"][0].as_py(), log["item_id"][0].as_py()
    assert run(["recommend", "registry#tiny@production", "--data", "store", "--user", user, "--k", "3"]) == 0
    of_user = capsys.readouterr().out
    assert run(["recommend", "registry#tiny@production", "--history", item, "--k", "3"]) == 0
    assert capsys.readouterr().out != of_user
    assert run(["registry", "rollback", "--name", "tiny", "--root", "registry"]) == 2
    assert "never at another version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recomend"], "did you mean 'recommend'"),
        (["recommend", "registry#tiny@prod", "--history", "x"], "production"),
        (["recommend", "registry#tiny", "--history", "no-such-item"], "'no-such-item' is not in"),
        (["recommend", "registry#tiny", "--data", "store", "--user", "nobody"], "user 'nobody' is not in"),
        (["recommend", "registry#tiny"], "no history"),
        (["evaluate", "nowhere", "--data", "store"], "nowhere"),
        (["evaluate", "registry#tiny", "--data", "nowhere"], "not a prepared data set"),
        (["train", "--config", "absent.yaml"], "does not exist"),
        (["train", "--config", "wrong.yaml"], "did you mean 'epochs'"),
        (["data", "check", "nowhere"], "not a prepared data set"),
        (["serve", "revoke", "nobody", "--keys", "absent.json"], "absent.json"),
    ],
)
def test_a_mistake_gives_one_message(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(home)
    Path("wrong.yaml").write_text("epoch: 3\n")
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
