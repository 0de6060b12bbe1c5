"""The steps as a user starts them: as Ray jobs on a cluster, and one by one on the command line."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.main import run
from elasticrec.data.synthetic import SyntheticConfig, generate
from tests.arch.fences import ROOT, fences

pytestmark = pytest.mark.timeout(400)
SHARED = "/shared/elasticrec"  # home of the pages
# What takes minutes of the round by default, made small.
SHORTER = {
    "jobs.train": ["--config", f"{SHARED}/train.yaml"],
    "jobs.compress": ["--space", f"{SHARED}/space.yaml"],
}
CONFIG = {
    "epochs": 4,
    "network": {"encoder": {"width": 16, "blocks": 1, "max_length": 20}},
    "plan": {"batch_users": 64, "shards": 8},
    "validation": {"every_epochs": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of a shop with its columns as the pages have them; jobs' relative paths start here."""
    folder = tmp_path_factory.mktemp("home")
    log = generate(SyntheticConfig(users=150, items=60)).select(["user_id", "item_id", "timestamp"])
    (folder / "logs").mkdir()
    pq.write_table(log.rename_columns(["customer", "sku", "at"]), folder / "logs" / "2024.parquet")
    (folder / "train.yaml").write_text(yaml.safe_dump(CONFIG))
    space = {"recipes": [[], [{"kind": "int8_table"}]]}
    (folder / "space.yaml").write_text(yaml.safe_dump(space | {"measure": {"rounds": 20}}))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=2)) as running:
        yield running


def run_as_said(cluster: LocalCluster, home: Path, page: str, command: str, version: str = "9") -> dict[str, str]:
    """Runs the block of a page that has a command, in this home and as short as that goes; what each job said.

    Args:
        version: in place of the page's 9.
    """
    (block,) = [fence for fence in fences(ROOT / "docs" / page) if command in fence.text]
    told: dict[str, str] = {}
    for line in block.commands():
        words = shlex.split(line)
        if "--runtime-env-json" not in words and "--" in words:
            words[words.index("--") : 0] = ["--runtime-env-json", json.dumps({"env_vars": {"ELASTICREC_HOME": SHARED}})]
        words += [word for module in SHORTER if module in words for word in SHORTER[module]]
        words = [version if word == "9" else word.replace(SHARED, str(home)) for word in words]
        program = {"ray": "ray.scripts.scripts", "elasticrec": "elasticrec.cli"}[words[0]]
        done = subprocess.run(
            [sys.executable, "-m", program, *words[1:]],
            cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:] or done.stderr[-3000:]}"
        told[next((word for word in words if word.startswith("jobs.")), words[1])] = done.stdout
    return told


def test_the_round_of_the_page_as_jobs(cluster: LocalCluster, home: Path) -> None:
    told = run_as_said(cluster, home, "jobs.md", "job jobs.prepare")
    assert "ndcg@10" in told["jobs.train"]
    assert "chosen bundle" in told["jobs.compress"]
    workers = {json.loads(line)["workers"] for line in (home / "runs/shop/steps.jsonl").read_text().splitlines()}
    assert workers <= {1, 2}
    quality = json.loads((home / "quality.json").read_text())
    manifest = json.loads((home / "runs/shop/bundle/manifest.json").read_text())
    assert quality["test"] == pytest.approx(manifest["metrics"]["test"])
    top = pq.read_table(home / "top" / "shop")
    assert top.num_rows == 150 * 20
    log = pq.read_table(home / "logs").select(["customer", "sku"])
    seen = set(zip(*log.to_pydict().values(), strict=True))
    assert not seen & set(zip(top["user_id"].to_pylist(), top["item_id"].to_pylist(), strict=True))


def test_the_same_on_the_command_line(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert run(["data", "check", "data/shop"]) == 0
    assert run(["bundle", "verify", "runs/shop/bundle"]) == 0
    assert run(["registry", "list"]) == 0
    assert "shop@1  production" in capsys.readouterr().out
    log = pq.read_table("logs")
    user, item = log["customer"][0].as_py(), log["sku"][0].as_py()
    assert run(["recommend", "runs/registry#shop@production", "--data", "data/shop", "--user", user, "--k", "3"]) == 0
    of_user = capsys.readouterr().out
    assert run(["recommend", "runs/registry#shop@production", "--history", item, "--k", "3"]) == 0
    assert capsys.readouterr().out != of_user
    assert run(["registry", "rollback", "--name", "shop"]) == 2
    assert "never at another version" in capsys.readouterr().err


def test_the_moves_of_the_page_as_jobs(cluster: LocalCluster, home: Path) -> None:
    root = str(home / "runs" / "registry")
    assert run(["registry", "publish", str(home / "runs/shop/bundle"), "--name", "shop", "--root", root]) == 0
    told = run_as_said(cluster, home, "how-to/canary.md", "jobs.canary", version="2")
    assert told.keys() == {"jobs.canary", "jobs.promote", "jobs.rollback"}
    assert Registry(root).labels("shop") == {"production": "1", "canary": "2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recomend"], "did you mean 'recommend'"),
        (["recommend", "runs/registry#shop@prod", "--history", "x"], "production"),
        (["recommend", "runs/registry#shop", "--history", "no-such-item"], "'no-such-item' is not in"),
        (["recommend", "runs/registry#shop", "--data", "data/shop", "--user", "nobody"], "user 'nobody' is not in"),
        (["recommend", "runs/registry#shop"], "no history"),
        (["evaluate", "nowhere", "--data", "store"], "nowhere"),
        (["evaluate", "runs/registry#shop", "--data", "nowhere"], "not a prepared data set"),
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
