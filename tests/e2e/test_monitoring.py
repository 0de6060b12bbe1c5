"""A served model under load and a training run, watched by a real Prometheus: no query and no alert is empty."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import Bundle, write_bundle
from elasticrec.artifact.registry import Registry
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, free_port, local_cluster
from elasticrec.cli.monitor import DISCOVERY, MonitorConfig, MonitorError, find, prometheus
from elasticrec.cli.service import deploy
from elasticrec.data.sequences import Sequences, open_store, write_store
from elasticrec.data.split import split
from elasticrec.evaluation.ranking import EvaluationConfig, rank
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.monitoring import dashboard, rules, series
from elasticrec.monitoring.drift import BEST, reference
from elasticrec.training.host import LocalHost, Preempted
from elasticrec.training.loop import Loop
from elasticrec.training.run import CheckpointConfig, RunConfig, ValidationConfig

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
ITEMS, USERS, EVENTS = 60, 200, 20
NETWORK = NetworkConfig(encoder=EncoderConfig(width=16, blocks=1, max_length=10))
TRAIN = """
import json, sys, ray
from elasticrec.config import from_mapping
from elasticrec.training.driver import fit
from elasticrec.training.run import RunConfig
ray.init(log_to_driver=False)
fit(from_mapping(RunConfig, json.loads(sys.argv[1])))
"""
GAP_S = 20
PATIENCE_S = 150  # it ends as soon as all is there; a busy machine takes its time


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(LocalClusterConfig(num_cpus=3, train_slots=1, metrics_s=1, auth="token")) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who had items by chance, popular ones more often."""
    folder = tmp_path_factory.mktemp("watched")
    random = np.random.default_rng(0)
    item_E = np.sort(random.geometric(0.05, USERS * EVENTS * 2).clip(1, ITEMS))[::2]
    random.shuffle(item_E)
    index = np.arange(1, ITEMS + 1)
    items = pa.table(
        {
            "item_index": index,
            "item_id": [f"i{number}" for number in index],
            "title": [f"Item {number}" for number in index],
            "categories": [["odd"] if number % 2 else ["even"] for number in index],
            "count": np.bincount(item_E, minlength=ITEMS + 1)[1:],
        }
    )
    sequences = Sequences(
        item_E=item_E.astype(np.int32),
        offset_U1=np.arange(0, USERS * EVENTS + 1, EVENTS, dtype=np.int64),
        time_E=np.tile(np.arange(EVENTS, dtype=np.int64), USERS),
    )
    users = pa.table({"user_index": np.arange(USERS), "user_id": [f"u{number}" for number in range(USERS)]})
    write_store(folder / "data", sequences, users, items, command="test")
    return folder


def bundle(folder: Path, seed: int) -> Bundle:
    """Untrained; with what it answers to test cases, as a training run leaves it."""
    torch.manual_seed(seed)
    store, network = open_store(folder / "data"), Network(NETWORK, ITEMS).eval()
    cases = split(RunConfig().split, store.sequences).test
    ranking = rank(network, store.sequences, cases, EvaluationConfig(ks=(BEST,)), max_length=10)
    counts = np.array([0, *store.items().column("count").to_pylist()])
    answers = reference(ranking.top_CK, ranking.score_CK, counts).plain()
    lineage = {"answers": answers}
    return write_bundle(folder / f"bundle-{seed}", network, store.items(), name="tiny", version="0", lineage=lineage)


@pytest.fixture(scope="module")
def service(cluster: LocalCluster, data: Path) -> str:
    """Production, a canary with half of the users, and a shadow of everything."""
    registry = Registry(data / "registry")
    for seed in range(3):
        registry.publish(bundle(data, seed), "films")
    registry.set_label("films", "production", "1")
    registry.set_label("films", "canary", "2", percent=50)
    registry.set_label("films", "shadow", "3", percent=100)
    arguments = {"bundle": f"{data}/registry#films@production", "seed": str(data / "data")}
    return deploy(cluster, arguments | {"events": str(data / "events.sqlite")})


def ask(client: httpx.Client, number: int) -> None:
    """Something of everything that a client does; every fourth time in too much of a hurry for a search."""
    user = f"u{number % USERS}"
    client.post("/v1/recommend", json={"user_id": user})
    client.post("/v1/recommend", json={"user_id": user, "filters": {"categories": {"any": ["odd"]}}})
    item = f"i{number % ITEMS + 1}"
    client.post("/v1/events", json={"events": [{"user_id": f"new{number}", "item_id": item}] * 20})
    hurry = {"x-request-timeout-ms": "1"} if number % 4 == 0 else {}
    client.get("/v1/search", params={"q": "item", "user_id": user}, headers=hurry)


@contextmanager
def load(url: str) -> Iterator[None]:
    """A client that asks until the block ends."""
    over = threading.Event()

    def run() -> None:
        with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
            for number in range(1_000_000):
                if over.wait(0.02):
                    return
                ask(client, number)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Leaves(LocalHost):
    """Is given notice at its third meeting."""

    meetings = 0

    def leaving(self) -> bool:
        self.meetings += 1
        return self.meetings > 3


@contextmanager
def training(cluster: LocalCluster, data: Path) -> Iterator[None]:
    """A run that was stopped and goes on on the cluster, for as long as the block."""
    run = RunConfig(
        name="watched",
        data=data / "data",
        storage=data / "runs",
        epochs=100_000,
        network=NETWORK,
        validation=ValidationConfig(every_epochs=100_000),
        checkpoint=CheckpointConfig(interval_s=1),
    )
    with pytest.raises(Preempted):
        Loop(run, open_store(run.data), _Leaves(run.folder)).train()
    plain = {
        "name": run.name,
        "data": str(run.data),
        "storage": str(run.storage),
        "epochs": run.epochs,
        "network": {"encoder": {"width": 16, "blocks": 1, "max_length": 10}},
        "validation": {"every_epochs": 100_000},
        "checkpoint": {"interval_s": 1},
    }
    env = cluster.env | {"PYTHONPATH": str(ROOT / "platform")}
    log = data / "train.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN, json.dumps(plain)], env=env, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
        assert child.poll() is None, log.read_text()
    finally:
        child.kill()
        child.wait()


class Watched:
    """Asks Prometheus."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def values(self, expression: str) -> list[float]:
        """Those that are numbers."""
        answer = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        found = [float(sample["value"][1]) for sample in answer["data"]["result"]]
        return [value for value in found if value == value]  # noqa: PLR0124 - NaN

    def firing(self) -> set[str]:
        alerts = self._client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def expressions() -> dict[tuple[str, str], str]:
    """Every query of the dashboard, recorded share, value that an alert compares, and kind of drift."""
    asked = [(title, text.replace(dashboard.WINDOW, "20s")) for title, text in dashboard.queries()]
    windows = dict.fromkeys(window for burn in rules.BURNS for window in (burn.long, burn.short))
    asked += [(one.name, one.record(window)) for one in rules.OBJECTIVES for window in windows]
    asked += [("drift", series.DRIFT.select(of=of)) for of in ("scores", "items", "events")]
    asked += [(one.name, one.value) for one in rules.ALERTS]
    found = {(title, text): text for title, text in asked}
    assert len(found) == len(asked), "a query is there twice"
    return found


@contextmanager
def heeded(told: signal.Signals) -> Iterator[None]:
    """A program that is started meanwhile does not ignore the signal, though these tests may (`nohup`)."""
    before = signal.getsignal(told)
    signal.signal(told, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(told, before)


@pytest.mark.parametrize(("told", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_command_ends_in_order(tmp_path: Path, told: signal.Signals, status: int) -> None:
    port = free_port()
    words = ["monitor", "--targets", "127.0.0.1:1", "--port", str(port), "--folder", str(tmp_path)]
    with heeded(told):
        child = subprocess.Popen(
            [sys.executable, "-u", "-m", "elasticrec.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert child.stdout is not None
    assert f"http://127.0.0.1:{port}" in child.stdout.readline()
    assert httpx.get(f"http://127.0.0.1:{port}/api/v1/rules", trust_env=False).json()["data"]["groups"]
    child.send_signal(told)
    _, complaints = child.communicate(timeout=30)
    assert (child.returncode, complaints) == (status, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}", trust_env=False)


def test_no_query_and_no_alert_is_empty(
    cluster: LocalCluster, data: Path, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "file_sd_configs" in find(discovery=cluster.temp_dir / DISCOVERY)
    with pytest.raises(MonitorError, match="set RAY_AUTH_TOKEN"):
        find(dashboard=cluster.dashboard_url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.env["RAY_AUTH_TOKEN"])
    found = find(dashboard=cluster.dashboard_url)
    config = MonitorConfig(discovery=found, folder=tmp_path, port=free_port(), interval_s=1)
    with (
        prometheus(config) as url,
        load(service),
        httpx.Client(base_url=url, timeout=10, trust_env=False) as client,
    ):
        watched, wanted = Watched(client), expressions()
        with training(cluster, data):
            deadline_s = time.monotonic() + PATIENCE_S
            empty = set(wanted)
            while (empty or "ElasticrecAvailabilityBurns" not in watched.firing()) and time.monotonic() < deadline_s:
                time.sleep(1)
                empty = {name for name in empty if not watched.values(wanted[name])}
            assert {name: wanted[name] for name in empty} == {}
            assert "ElasticrecAvailabilityBurns" in watched.firing()
            assert "ElasticrecLatencyBurns" not in watched.firing()
            eventually(assert_true_to_life, watched)
        assert_over(watched)


def eventually(check: Callable[[Watched], None], watched: Watched) -> None:
    """Asked once, a busy machine had no series at all that had been there before; a late scrape, it is believed."""
    deadline_s = time.monotonic() + GAP_S
    while True:
        try:
            return check(watched)
        except (AssertionError, IndexError):
            if time.monotonic() > deadline_s:
                raise
        time.sleep(1)


def assert_true_to_life(watched: Watched) -> None:
    """What is counted is what happened: versions, statuses, and distributions whose parts fit each other."""
    roles = watched.values(f"count by (role) ({series.ANSWERS.select(source='model')})")
    assert len(roles) == 3
    assert watched.values(f"sum({series.REQUESTS.select(status='504')})")[0] > 1
    assert watched.values(f"max({series.DRIFT.select(of='scores')})")[0] < 0.25  # the same users as in the test cases
    assert max(watched.values(f"max by (version) ({series.DRIFT.select(of='events')})")) > 0.25  # all items alike
    counted = f"sum({series.REQUEST_MS.select('count')})"
    last = f"sum({series.REQUEST_MS.select('bucket', le='+Inf')})"
    assert watched.values(f"{counted} - {last}") == [pytest.approx(0, abs=1)]
    assert watched.values(f"min({series.TRAIN_STARTS.select(run='watched')})") == [2]


def assert_over(watched: Watched) -> None:
    """A run that has ended leaves nothing that an alert looks at."""
    looked_at = [rules.alert(name).value for name in ("ElasticrecTrainingStalls", "ElasticrecCheckpointOld")]
    deadline_s = time.monotonic() + PATIENCE_S
    while any(map(watched.values, looked_at)) and time.monotonic() < deadline_s:
        time.sleep(1)
    assert {value: watched.values(value) for value in looked_at} == {value: [] for value in looked_at}
