"""Every command of the documentation: run here, or, where its block says that it belongs elsewhere, understood."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.data.prepare import PrepareConfig, prepare
from elasticrec.data.synthetic import SyntheticConfig, describe_items, generate
from tests.arch.fences import ELSEWHERE, PAGES, ROOT, check_command, fences
from tests.e2e.docs_session import ASKED, Session

pytestmark = pytest.mark.timeout(900)


# Of commands that a page does not run here: by their first words, the test that runs the like, and what it says of it;
# nothing where another block of the pages runs the like.
RUN_BY = {
    "ray up": ("cluster/test_ray_up.py", '"up", "-y", config'),
    "ray dashboard": ("cluster/test_ray_up.py", '"dashboard", config'),
    "ray drain-node": ("cluster/test_training.py", '"drain-node"'),
    "ray start": ("cluster/test_cluster_yaml.py", "own_worker"),
    "python deploy/drain.py": ("cluster/test_cluster_yaml.py", "drains_it"),
    "serve run": ("e2e/test_serving.py", "`serve run serve_apps.recommender:app"),
    "serve deploy": ("e2e/test_serving.py", '"deploy"'),
    "redis-server": ("contract/redis_server.py", "redis-server"),
    "elasticrec serve run": None,
    "elasticrec registry promote": ("cluster/test_rollout.py", '"promote"'),
    "elasticrec registry canary": ("e2e/test_ways.py", '"jobs.canary"'),
    "elasticrec registry shadow": ("cluster/test_rollout.py", '"shadow"'),
    "elasticrec registry rollback": ("cluster/test_rollout.py", '"rollback"'),
    "elasticrec registry publish": ("e2e/test_ways.py", '"registry", "publish"'),
    "elasticrec compress": ("e2e/test_ways.py", '"jobs.compress"'),
    "elasticrec train": None,
    "elasticrec data synthesize": ("unit/test_data_synthetic.py", '"synthesize"'),
    "elasticrec data prepare": None,
    "elasticrec monitor": ("e2e/test_monitoring.py", 'words = ["monitor"'),
    "curl": None,
    "export": None,
    "deploy/kuberay/secrets.sh": ("arch/test_kuberay.py", "secrets.sh"),
}
NOWHERE = ("kubectl", "docker")  # there is neither a Kubernetes nor a daemon where these tests run


def make_logs(folder: Path) -> None:
    """Logs as the pages have them: clicks and products of a shop, and a year of another one."""
    config = SyntheticConfig(users=80, items=60)  # one step an epoch
    log, items = generate(config), describe_items(config)
    users = pa.array([f"c-{user.removeprefix('u')}" for user in log["user_id"].to_pylist()])
    skus = {item: f"sku-{place}" for place, item in enumerate(items["item_id"].to_pylist())}
    sku = pa.array([skus[item] for item in log["item_id"].to_pylist()])
    clicks = pa.table({"customer": users, "sku": sku, "at": log["timestamp"]})
    for name, table in (("clicks/one.parquet", clicks), ("logs/2024-01.parquet", _with_kind(clicks))):
        (folder / name).parent.mkdir()
        pq.write_table(table, folder / name)
    titles = pa.table({"sku": list(skus.values()), "name": items["title"]})
    shelves = pa.array(["tea" if place % 2 else "books" for place in range(len(skus))])
    pyarrow.csv.write_csv(titles.append_column("shelf", shelves), folder / "products.csv")
    pyarrow.csv.write_csv(titles.append_column("tags", shelves), folder / "catalogue.csv")
    columns = {"user": "customer", "item": "sku", "time": "at"}
    prepare(PrepareConfig(interactions=(str(folder / "clicks"),), out=folder / "store", **columns))  # type: ignore[arg-type]


def _with_kind(clicks: pa.Table) -> pa.Table:
    return clicks.append_column("kind", pa.array(["view", "buy"] * (len(clicks) // 2) + ["view"] * (len(clicks) % 2)))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """By page, what each of its commands did: one session of all pages, on one cluster."""
    folder = tmp_path_factory.mktemp("docs")
    make_logs(folder)
    with pytest.MonkeyPatch.context() as patch:  # of the cluster, and so of its workers: the pages' own modules
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(folder)]))
        patch.setenv("ELASTICREC_OWN_BLOCKS", "shop_blocks")
        with local_cluster(LocalClusterConfig(num_cpus=2, train_slots=2)) as cluster:
            command = [sys.executable, "-m", "tests.e2e.docs_session", str(folder)]
            done = subprocess.run(
                command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=840, check=False
            )
    (folder / "outcomes.jsonl").write_text(done.stdout, encoding="utf-8")  # who took how long
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            outcome = json.loads(line)
            found[outcome["page"]].append(outcome)
    assert done.returncode == 0, done.stderr[-3_000:]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_block_says_what_it_is(page: str) -> None:
    assert [fence.problem() for fence in fences(ROOT / page) if fence.problem()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if fences(ROOT / page)])
def test_each_command_does_what_the_page_says(page: str, outcomes: dict[str, list[dict[str, str]]]) -> None:
    assert outcomes[page]
    assert [f"{outcome['command']}: {outcome['error']}" for outcome in outcomes[page] if outcome["error"]] == []


def commands(*, run_here: bool) -> set[str]:
    """Of shell blocks that this session runs, or of those that it only reads."""
    return {
        command
        for page in PAGES for fence in fences(ROOT / page) if fence.language in ("bash", "sh")
        for command in fence.commands() if run_here == (fence.title not in ELSEWHERE or command in ASKED)
    }  # fmt: skip


def jobs_that_run() -> set[str]:
    """Modules of the two blocks that test_ways runs as they stand."""
    blocks = [*fences(ROOT / "docs/jobs.md"), *fences(ROOT / "docs/how-to/canary.md")]
    ran = [block for block in blocks if "job jobs.prepare" in block.text or "jobs.canary" in block.text]
    return {word for block in ran for line in block.commands() for word in line.split() if word.startswith("jobs.")}


NOT_RUN = sorted(command for command in commands(run_here=False) if not command.startswith(NOWHERE))


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_a_page_does_not_run_some_test_does(command: str) -> None:
    if command.startswith("ray job submit"):
        assert {word for word in command.split() if word.startswith("jobs.")} <= jobs_that_run()
        return
    start, told = next(pair for pair in RUN_BY.items() if command.startswith(pair[0]))
    if told is None:
        assert [other for other in commands(run_here=True) if other.startswith(start)]
    else:
        assert told[1] in (ROOT / "tests" / told[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```bash\nelasticrec data check nowhere\n```", "not a prepared data set"),
        ("```bash\nfrobnicate\n```", "neither run nor understood"),
        ("```bash\nmake coffee\n```", "no target"),
        ('```bash title="on a cluster"\nelasticrec train --elastic.max-worker 2\n```', "max-worker"),
        ('```bash title="on a cluster"\nelasticrec registry promte\n```', "did you mean 'promote'"),
        ('```bash title="on a cluster"\nray job submit --workingdir . -- python -m jobs.train\n```', "workingdir"),
        ('```bash title="on a cluster"\nray job submit -- python -m jobs.trian\n```', "no job"),
        ('```bash title="on a cluster"\nray job submit -- python -m jobs.train --epoch 3\n```', "epoch"),
        ('```bash title="on a cluster"\nray up clusters.yaml\n```', "clusters.yaml"),
        ('```bash title="on a cluster"\nserve run serve_apps.recommender:app bundel=x\n```', "bundel"),
        ('```bash title="on a cluster"\nserve deploy serve_apps/recomender.yaml\n```', "recomender.yaml"),
        ('```bash title="on Kubernetes"\nkubectl aply -k deploy/kuberay\n```', "aply"),
        (
            '```bash title="on Kubernetes"\nkubectl apply -f deploy/kuberay/jobs.yaml\n```',
            "no deploy/kuberay/jobs.yaml",
        ),
        ('```bash title="with Docker"\ndocker build -f deploy/Dockerfile .\n```', "no deploy/Dockerfile"),
        ("```python\nimport elasticrec.nothing\n```", "No module named"),
        ('```python title="in a program"\nfrom elasticrec.config import laod\n```', "has no ['laod']"),
        ("```python\n1 / 0\n```", "division by zero"),
        ("```yaml\na: [\n```", "while parsing"),
        ("```yaml\nepoch: 3\n```", "neither settings of a run nor of a sweep"),
        ("```yaml\nplan: {shard: 3}\n```", "did you mean 'shards'"),
        ("```json\n{…}\n```", "JSONDecodeError"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # in Ray's own code
def test_a_mistake_in_a_page_is_found(tmp_path: Path, block: str, error: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{block}\n", encoding="utf-8")
    session = Session(tmp_path)
    said = [text for fence in fences(page) for _, text in session.block(fence)]
    assert len(said) == 1
    assert error in said[0]


@pytest.mark.parametrize(
    ("opening", "problem"),
    [
        ('bash title="somewhere"', "title 'somewhere' says neither a file nor a place"),
        ("shell", "is no language of ours"),
        ("bash norun", "is no language of ours"),
    ],
)
def test_a_block_that_is_neither_is_named(tmp_path: Path, opening: str, problem: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```{opening}\nls\n```\n", encoding="utf-8")
    (fence,) = fences(page)
    assert problem in fence.problem()


def test_continued_lines_comments_and_functions_are_read() -> None:
    text = 'job() {\n  ray job submit -- python -m "$@"\n}\n\njob jobs.train --name a \\\n    --epochs 3  # three\n'
    from tests.arch.fences import Fence

    fence = Fence(page="p", line=1, language="bash", title="", text=text)
    assert list(fence.commands()) == ["ray job submit -- python -m jobs.train --name a --epochs 3"]
    check_command(next(fence.commands()), ROOT)
