"""Versions of a service: who is answered by which, how replicas move to another, and which bundles they refuse."""

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.artifact.bundle import Bundle, open_bundle, write_bundle
from elasticrec.artifact.golden import QUESTIONS, differences, golden_answers, parse_golden, past_of, render_golden
from elasticrec.artifact.registry import Registry
from elasticrec.cli import registry as commands
from elasticrec.cli import rollout
from elasticrec.cli.rollout import Application, RolloutError, answered, running
from elasticrec.errors import BundleError, ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.tables import TABLES, Precision
from elasticrec.serving.between import BatchesOf
from elasticrec.serving.catalogue import Catalogue
from elasticrec.serving.history import Request
from elasticrec.serving.labels import rollout_of
from elasticrec.serving.postprocess import Chosen, Recommendation
from elasticrec.serving.question import Candidates, Question
from elasticrec.serving.rollout import Rollout, settled, staged
from elasticrec.serving.scorer import Scorer
from elasticrec.serving.selfcheck import BundleRefusedError, SelfCheck, check
from elasticrec.serving.versions import Loaded, Versions

N_ITEMS = 30


def item_table() -> pa.Table:
    index = np.arange(1, N_ITEMS + 1)
    return pa.table({"item_index": index, "item_id": [f"i{n}" for n in index], "title": [f"T{n}" for n in index],
                     "categories": [["x"]] * N_ITEMS, "count": index[::-1]})  # fmt: skip


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    made = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=6)), N_ITEMS).eval()
    with torch.no_grad():
        made.encoder.items.get_parameter("weight_ID").normal_()
    return made


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Versions 1, 2 and 3 of `films`, of three networks."""
    registry = Registry(tmp_path / "registry")
    for seed in range(3):
        bundle = write_bundle(tmp_path / f"b{seed}", network(seed), item_table(), name="films", version="0")
        registry.publish(bundle, "films")
    return registry


def test_a_share_of_the_users_is_answered_by_the_canary_and_always_the_same_ones() -> None:
    users = [f"user {number}" for number in range(5_000)]
    chosen: set[str] = set()
    for percent in (0, 1, 10, 50, 100):
        rollout = Rollout(production="a", canary="b", canary_percent=percent)
        now = {user for user in users if rollout.choose(user) == "b"}
        assert abs(len(now) / len(users) - percent / 100) < 0.02
        assert now >= chosen  # a larger share only adds users
        chosen = now
    other = Rollout(production="a", canary="c", canary_percent=10)
    first = Rollout(production="a", canary="b", canary_percent=10)
    assert {u for u in users if other.choose(u) == "c"} != {u for u in users if first.choose(u) == "b"}
    assert Rollout(production="a", canary="b", canary_percent=100).choose(None) == "a"


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_percentage_is_one(percent: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 100"):
        Rollout(production="a", canary_percent=percent)


uris = st.sampled_from("abcd")
rollouts = st.builds(Rollout, production=uris, canary=st.none() | uris, shadow=st.none() | uris,
                     held=st.lists(uris, max_size=2).map(tuple))  # fmt: skip


@given(live=rollouts, wanted=rollouts)
def test_a_change_never_asks_for_what_is_not_loaded(live: Rollout, wanted: Rollout) -> None:
    step = staged(live, wanted)
    assert (step.production, step.canary, step.shadow) == (live.production, live.canary, live.shadow)
    assert set(step.bundles) >= set(wanted.bundles) | set(live.bundles)
    end = settled(live, wanted)
    assert (end.production, end.canary, end.shadow) == (wanted.production, wanted.canary, wanted.shadow)
    assert set(end.bundles) <= set(step.bundles)
    assert live.production in end.bundles  # the way back needs no loading
    assert len(end.held) <= 1
    assert Rollout.of(end.plain()) == end


def test_labels_say_what_is_served(registry: Registry) -> None:
    reference = f"{registry.root.uri}#films@production"
    registry.set_label("films", "production", "1")
    one, two, three = (registry.resolve("films", version) for version in "123")
    assert rollout_of(reference) == Rollout(production=one)
    registry.set_label("films", "canary", "2", percent=5)
    registry.set_label("films", "shadow", "3", percent=100)
    full = Rollout(production=one, canary=two, canary_percent=5, shadow=three, shadow_percent=100)
    assert rollout_of(reference) == full
    registry.set_label("films", "canary", "2", percent=0)
    assert rollout_of(reference).canary is None
    assert rollout_of(f"{registry.root.uri}#films@3") == Rollout(production=three)
    assert rollout_of(three) == Rollout(production=three)


def test_a_published_bundle_carries_its_answers(registry: Registry) -> None:
    bundle = registry.open("films", "1")
    golden = bundle.golden()
    assert golden is not None
    assert golden == golden_answers(network(0)) == parse_golden(render_golden(golden), "here")
    assert {len(answer.history) for answer in golden} == set(range(1, 7))
    again = registry.open("films", registry.publish(bundle, "films"))
    assert again.golden() == golden
    assert open_bundle(bundle.uri).manifest.files["golden.json"] == again.manifest.files["golden.json"]
    for raw in (b"{", b"{}", b'{"questions": []}', b'{"questions": [{"history": [], "items": [], "scores": []}]}'):
        with pytest.raises(BundleError, match="here' holds no golden answers"):
            parse_golden(raw, "here")


def test_a_bundle_that_answers_as_published_is_taken_and_another_refused(registry: Registry) -> None:
    one = registry.open("films", "1")
    check(one, one.network(), Scorer(one.network()), SelfCheck())
    wrong = network(1)  # whole, and of the same size, but not what was published
    with pytest.raises(BundleRefusedError, match=r"versions/1' is refused: .* answer 0"):
        check(one, wrong, Scorer(wrong), SelfCheck())
    with pytest.raises(BundleRefusedError, match=r"one answer takes .* ms, 1e-06 are allowed"):
        check(one, one.network(), Scorer(one.network()), SelfCheck(max_latency_ms=1e-6))
    check(one, one.network(), Scorer(one.network()), None)  # nothing else could answer
    with pytest.raises(ConfigError, match="must be above 0"):
        SelfCheck(max_latency_ms=0)


def test_a_version_is_asked_between_batches_by_the_thread_that_answers(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elasticrec.serving.between.SHORT_S", 60.0)  # the first pass of a busy machine may take long
    one, threads = open_bundle(registry.resolve("films", "1")), []

    class Noting(Scorer):
        def score(self, question: Question) -> Candidates:
            threads.append(threading.current_thread().name)
            return super().score(question)

    with ThreadPoolExecutor(1, thread_name_prefix="model") as thread:
        check(one, one.network(), Noting(one.network()), SelfCheck(questions=4, attempts=2), BatchesOf(thread))
    assert threads == ["MainThread"] + ["model_0"] * (QUESTIONS + 4 * 2)  # each alone; and how long one takes


def test_a_version_that_is_slow_is_asked_beside_the_batches() -> None:
    threads = []

    def piece(seconds: float) -> None:
        threads.append(threading.current_thread().name)
        time.sleep(seconds)

    with ThreadPoolExecutor(1, thread_name_prefix="model") as thread:
        between = BatchesOf(thread)
        for seconds in (0.06, 0.06, 0.001, 0.06, 0.001, 0.001):
            between(partial(piece, seconds))
    assert threads == ["MainThread"] * 3 + ["model_0"] + ["MainThread"] + ["model_0"]


def test_a_piece_does_not_wait_for_ever_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticrec.serving.between.PATIENCE_S", 0.05)
    gate, threads = threading.Event(), []
    with ThreadPoolExecutor(1, thread_name_prefix="model") as thread:
        between = BatchesOf(thread)
        between(lambda: None)
        thread.submit(gate.wait)  # thousands of users
        between(lambda: threads.append(threading.current_thread().name))
        gate.set()
    assert threads == ["MainThread"]


def test_between_two_pieces_batches_go_that_come_a_little_later() -> None:
    done: list[str] = []
    with ThreadPoolExecutor(1) as thread:
        between = BatchesOf(thread)
        between(lambda: None)
        later = threading.Timer(0.07, lambda: thread.submit(done.append, "a batch"))

        def piece() -> str:
            later.start()
            time.sleep(0.04)
            done.append("a piece")
            return "given"

        assert between(piece) == "given"
        between(lambda: done.append("the next piece"))
        with pytest.raises(BundleRefusedError, match="as it was raised"):
            between(lambda: fail("as it was raised"))
    assert done == ["a piece", "a batch", "the next piece"]


def fail(why: str) -> None:
    raise BundleRefusedError(why)


@pytest.mark.parametrize("precision", TABLES)
def test_every_table_answers_through_the_stages_as_when_it_was_published(precision: Precision) -> None:
    torch.manual_seed(0)
    encoder = EncoderConfig(width=8, blocks=1, max_length=6)
    made = Network(NetworkConfig(encoder=encoder, table=precision), N_ITEMS).eval()
    items = made.encoder.items
    items.load_state_dict({
        name: torch.randint(-9, 9, value.shape).to(value.dtype) for name, value in items.state_dict().items()
    })  # fmt: skip
    golden = golden_answers(made)
    past = past_of([list(answer.history) for answer in golden], encoder.inputs)
    none_N = np.zeros(0, dtype=np.int64)
    candidates = Scorer(made).score(Question(past=past, blocked_row_N=none_N, blocked_item_N=none_N, k=10))
    item_BK, score_BK = candidates.item_BK, candidates.score_BK
    assert differences(golden, item_BK, score_BK) is None
    assert differences(golden, item_BK, score_BK + 0.03 * np.abs(score_BK).max() + 0.1) is not None
    assert differences(golden, item_BK, score_BK * np.float32("nan")) is not None
    assert differences(golden, item_BK % 3 + 1, score_BK) is not None
    assert differences(golden, item_BK[:-1], score_BK[:-1]) is not None


class Fixed:
    """A version that answers with its own name."""

    def __init__(self, name: str, gate: asyncio.Event | None = None) -> None:
        self.version = name
        self.catalogue = Catalogue(item_table())
        self._gate = gate

    def popular(self, requests: Sequence[Request]) -> list[Recommendation]:
        chosen = (Chosen(item_id="popular", title=None, score=None),)
        return [Recommendation(items=chosen, source="popularity", history_length=0, timings_ms={}) for _ in requests]

    async def recommend(self, requests: Sequence[Request]) -> list[Recommendation]:
        if self._gate is not None:
            await self._gate.wait()
        chosen = (Chosen(item_id=self.version, title=None, score=1.0),)
        return [Recommendation(items=chosen, source="model", history_length=1, timings_ms={}) for _ in requests]


def loader(*bad: str, gate: asyncio.Event | None = None):  # type: ignore[no-untyped-def]
    def load(uri: str) -> Loaded:
        if uri in bad:
            raise BundleRefusedError(f"'{uri}' is refused: it is bad")
        fixed = Fixed(uri, gate if uri == "slow" else None)
        return Loaded(model=fixed, recommend=fixed.recommend)

    return load


def requests(count: int) -> list[Request]:
    return [Request(k=1, user_id=f"user {number}") for number in range(count)]


def test_each_user_is_answered_by_the_version_that_the_answer_names() -> None:
    async def scenario() -> None:
        versions = Versions(loader())
        rollout = Rollout(production="a", canary="b", canary_percent=30)
        await versions.apply(rollout)
        asked = requests(200)
        answers = await versions.recommend(asked)
        for request, answer in zip(asked, answers, strict=True):
            assert answer.version == answer.items[0].item_id == rollout.choose(request.user_id)
        assert {answer.version for answer in answers} == {"a", "b"}
        assert sum(versions.state()["answered"].values()) == 200
        assert versions.version == "a"
        (popular,) = versions.popular(requests(1))
        assert popular.degraded
        assert popular.version == "a"

    asyncio.run(scenario())


def test_what_is_under_way_finishes_on_the_version_that_it_began_with() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        versions = Versions(loader(gate=gate))
        await versions.apply(Rollout(production="slow"))
        waiting = asyncio.create_task(versions.recommend(requests(3)))
        await asyncio.sleep(0)
        await versions.apply(Rollout(production="b"))
        assert [answer.version for answer in await versions.recommend(requests(2))] == ["b", "b"]
        assert not waiting.done()
        gate.set()
        assert [answer.version for answer in await waiting] == ["slow"] * 3
        assert set(versions.state()["versions"]) == {"b"}

    asyncio.run(scenario())


def test_a_refused_bundle_leaves_what_was_live(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        versions = Versions(loader("bad"))
        with pytest.raises(BundleError, match="'bad' is refused"):
            await versions.apply(Rollout(production="bad"))
        await versions.apply(Rollout(production="a"))
        for wanted in (
            Rollout(production="bad"),
            Rollout(production="a", canary="bad", canary_percent=100),
            Rollout(production="a", shadow="bad", shadow_percent=100),
            Rollout(production="a", held=("bad",)),
        ):
            await versions.apply(wanted)
            assert versions.refused == {"bad": "'bad' is refused: it is bad"}
            assert versions.state()["asked"] == wanted.plain()
            assert [answer.version for answer in await versions.recommend(requests(20))] == ["a"] * 20
        await versions.apply(Rollout(production="c"))
        assert versions.refused == {}

    asyncio.run(scenario())
    assert "bundle refused, the versions before stay" in caplog.text


def test_a_shadow_is_asked_and_compared_but_never_returned() -> None:
    async def scenario() -> None:
        versions = Versions(loader())
        await versions.apply(Rollout(production="a", shadow="b", shadow_percent=100))
        for _ in range(3):
            assert [answer.version for answer in await versions.recommend(requests(4))] == ["a"] * 4
            await asyncio.sleep(0.01)
        assert versions.state()["shadow"] == {
            "compared": 12, "same_first": 0, "failed": 0, "skipped": 0, "mean_overlap": 0.0,
        }  # fmt: skip
        await versions.apply(Rollout(production="a", shadow="b", shadow_percent=0))
        await versions.recommend(requests(4))
        await asyncio.sleep(0.01)
        assert versions.state()["shadow"]["compared"] == 12

    asyncio.run(scenario())


def test_a_slow_shadow_is_skipped_and_holds_nobody_up() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        versions = Versions(loader(gate=gate))
        await versions.apply(Rollout(production="a", shadow="slow", shadow_percent=100))
        for _ in range(3):
            await asyncio.wait_for(versions.recommend(requests(2)), 5)
            await asyncio.sleep(0)
        assert versions.state()["shadow"]["skipped"] == 4
        gate.set()

    asyncio.run(scenario())


def test_a_damaged_bundle_is_refused_by_its_checksum(registry: Registry) -> None:
    def load(uri: str) -> Loaded:
        bundle: Bundle = open_bundle(uri)
        fixed = Fixed(bundle.version)
        return Loaded(model=fixed, recommend=fixed.recommend)

    async def scenario() -> None:
        versions = Versions(load)
        await versions.apply(Rollout(production=registry.resolve("films", "1")))
        two = registry.resolve("films", "2")
        weights = Path(two, "weights.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        await versions.apply(Rollout(production=two))
        assert "weights.safetensors' is damaged" in versions.refused[two]
        assert versions.version == "1"

    asyncio.run(scenario())


WANTED = Rollout(production="b")
MODEL_TOOK: dict[str, object] = {"told": WANTED.plain(), "asked": WANTED.plain(), "refused": {}}
TOOK: dict[str, object] = MODEL_TOOK | {"live": WANTED.plain()}


def test_a_rollout_is_done_when_every_deployment_answered() -> None:
    before: dict[str, object] = TOOK | {"asked": Rollout(production="a").plain()}
    both = {"GatewayReplica": [TOOK, TOOK], "ModelReplica": [MODEL_TOOK]}
    assert answered(both, WANTED, checks=True)
    for states in (
        both | {"ModelReplica": None},
        both | {"GatewayReplica": [TOOK, before]},
        both | {"ModelReplica": [MODEL_TOOK | {"told": Rollout(production="c").plain()}]},  # it moves on already
        {"RecommenderReplica": None},
    ):
        for checks in (True, False):
            assert not answered(states, WANTED, checks=checks), states
    with pytest.raises(RolloutError, match="it is bad"):
        answered(both | {"ModelReplica": [MODEL_TOOK | {"refused": {"b": "it is bad"}}]}, WANTED, checks=True)


def test_a_bundle_that_no_replica_checked_is_not_rolled_out() -> None:
    for states in ({}, {"RecommenderReplica": []}, {"GatewayReplica": [TOOK], "ModelReplica": []}):
        with pytest.raises(RolloutError, match=r"no replica of .* runs that could check the bundle"):
            answered(states, WANTED, checks=True)  # type: ignore[arg-type]
    assert answered({"GatewayReplica": [TOOK], "ModelReplica": []}, WANTED, checks=False)  # once they did


@pytest.mark.parametrize(
    ("said", "state", "settled"), [(1, "STOPPING", True), (1, "RUNNING", False), (2, "RUNNING", True)]
)
def test_a_step_is_over_when_each_replica_has_spoken(said: int, state: str, settled: bool) -> None:
    class Client:
        def get_serve_details(self) -> dict[str, Any]:
            replicas = [{"state": "RUNNING"}, {"state": state}]
            deployment = {"status": "HEALTHY", "replicas": replicas}
            return {"applications": {"app": {"status": "RUNNING", "deployments": {"FusedReplica": deployment}}}}

    application = Application(name="app", client=Client())
    assert application._is_settled({"FusedReplica": [TOOK] * said}) == settled


def test_whatever_ends_the_first_step_replicas_are_told_of_what_is_live() -> None:
    told: list[Rollout] = []

    class Failing(Application):
        def _states(self):  # type: ignore[no-untyped-def]
            if told:
                raise KeyboardInterrupt
            return {"FusedReplica": [TOOK]}

        def _deploy(self, rollout: Rollout) -> None:
            told.append(rollout)

    with pytest.raises(KeyboardInterrupt):
        Failing(name="app", client=None).move(Rollout(production="c"), lambda: None)
    assert told == [staged(WANTED, Rollout(production="c")), WANTED]


def test_what_is_live_is_told_by_those_who_know() -> None:
    class Told(Application):
        def _states(self):  # type: ignore[no-untyped-def]
            return {"GatewayReplica": None, "ModelReplica": [MODEL_TOOK]}

        def _deployed(self):  # type: ignore[no-untyped-def]
            return {"deployments": [{"user_config": Rollout(production="a").plain()}]}

    assert Told(name="app", client=None).current() == Rollout(production="a")


@pytest.fixture
def served(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was deployed as the application that answers on a cluster: by default version 1 of the registry's films."""
    deployed: dict[str, Any] = {
        "name": rollout.NAME,
        "args": {"bundle": f"{registry.root.uri}#films@production"},
        "deployments": [{"user_config": Rollout(production=registry.resolve("films", "1")).plain()}],
    }

    class Client:
        def __init__(self, _address: str) -> None: ...

        def get_serve_details(self) -> dict[str, Any]:
            return {"applications": {rollout.NAME: {"deployed_app_config": deployed}}}

    monkeypatch.setenv("RAY_ADDRESS", "h:1")
    monkeypatch.setattr(rollout, "driver", lambda _address: contextlib.nullcontext())
    monkeypatch.setattr(rollout, "_dashboard_url", lambda: "http://h:2")
    monkeypatch.setattr("ray.dashboard.modules.serve.sdk.ServeSubmissionClient", Client)
    monkeypatch.setattr(Application, "_states", lambda _: {})
    return deployed


@pytest.mark.parametrize(
    "command", [partial(commands.promote, "films", "3"), partial(commands.canary, "films", "3", 5)]
)
def test_a_registry_that_is_not_the_applications_moves_nothing(
    registry: Registry, served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, command: Callable[..., None]
) -> None:
    served["args"]["bundle"] = "s3://prod/registry#films@production"
    monkeypatch.setattr(Application, "move", lambda *_: pytest.fail("another registry's version goes live"))
    root = registry.root.uri
    with pytest.raises(RolloutError, match=rf"'films' of the registry 's3://prod/registry', not of '{root}'.*--root"):
        command(root=root)
    assert registry.labels("films") == {}


def test_a_root_is_the_applications_by_each_of_its_names(
    registry: Registry, served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = registry.root.uri
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for of_application in (root, f"{root}/", f"file://{root}", "registry", str(tmp_path / "link")):
        served["args"]["bundle"] = f"{of_application}#films@production"
        for named in (root, "registry", "../" + tmp_path.name + "/registry", f"file://{root}", "link"):
            with running(Registry(named), "films") as application:
                assert application is not None, (of_application, named)
    served["args"]["bundle"] = "fsspec+memory://r#films@production"
    with running(Registry("fsspec+memory://r/"), "films") as application:
        assert application is not None


def test_a_relative_root_is_where_the_application_was_built(
    registry: Registry, served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served["args"]["bundle"] = "registry#films@production"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(registry.root.path, elsewhere / "registry")
    monkeypatch.chdir(elsewhere)
    with running(registry, "films") as application:
        assert application is not None
    told = rf"'films' of the registry '{registry.root}', not of '{elsewhere}/registry'"
    with pytest.raises(RolloutError, match=told), running(Registry("registry"), "films"):
        raise AssertionError("a copy of the registry was taken for it")
    with pytest.raises(RolloutError, match="which is no label of 'shows'"), running(registry, "shows"):
        raise AssertionError("another model's application was given")
