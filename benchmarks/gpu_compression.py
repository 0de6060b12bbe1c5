"""Compressed networks on a GPU: latency at batch 1, 32 and 256, bytes, and what is kept of HR@10 and NDCG@10.

python -m benchmarks.gpu_compression [--quick] [--device DEVICE] [--json FILE] [--report FILE] [--data STORE]

Two networks: one trained here on a store (MovieLens 100K), whose quality is measured too, and one of width 256, 4
blocks and 200 positions over a million random items, whose weights are much to read. Each recipe answers several ways:
launched kernel by kernel, as CUDA graphs, and of the larger network also compiled, and both. The float32 teacher,
launched, and the bfloat16 network, at its fastest, answer in turn with it. An answer is timed from the history on the
host to the best 100 unseen items on the host; `device_ms` is between two events around all but the way back. What
fails is a row with its reason.
"""

import argparse
import contextlib
import copy
import gc
import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.gpu_training import TINY, make_store
from benchmarks.result import Check, publish
from elasticrec.artifact.bundle import open_bundle
from elasticrec.cli.frontier import frontier_page
from elasticrec.compression.linears import BFloat16Linear, Fp8Linear, Int4Linear, Int8Linear, SparseLinear
from elasticrec.compression.paired import paired
from elasticrec.compression.pareto import Direction, Trial, choose, front, parse_budget
from elasticrec.compression.quantize import BFloat16Table, Int4Table, Int8Table
from elasticrec.compression.recipe import AS_TRAINED, Recipe, Step, label
from elasticrec.compression.workbench import Workbench, apply
from elasticrec.data.sequences import Int64, Store, open_store
from elasticrec.data.split import LeaveOneOut, split
from elasticrec.errors import ConfigError
from elasticrec.evaluation.ranking import EvaluationConfig, Scorer, histories, rank, rank_metrics
from elasticrec.model.answer import AnswerConfig, Answerer
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.recipe import recommended

ROOT = Path(__file__).parents[1]
BATCHES = (32, 256, 1)  # in the order in which shapes are compiled: the second finds what the first has made
DRAWN = 6  # batches of each size, which are asked in turn
BUDGET = "ndcg@10>=0.99*teacher"
EVALUATION = EvaluationConfig(ks=(10,), remove_seen=True)
REASON_CHARACTERS = 160
COMPILATIONS = 64  # of one function, for all recipes; more are launched, without a word


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is measured."""

    width: int = 256
    blocks: int = 4
    heads: int = 8
    max_length: int = 200
    items: int = 1_000_000
    batches: tuple[int, ...] = BATCHES
    rounds: int = 60
    warm_up: int = 8
    epochs: int = 100


FULL = Size()
QUICK = Size(width=64, blocks=2, heads=2, max_length=16, items=2_000, batches=(4, 6, 1), rounds=4, warm_up=1, epochs=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A recipe, and in what the rest of the network multiplies."""

    recipe: Recipe = ()
    products: Literal["float32", "bfloat16"] = "bfloat16"
    trained_only: bool = False  # too slow to make of a million rows

    @property
    def name(self) -> str:
        return label(self.recipe) if self.recipe or self.products == "float32" else f"{AS_TRAINED}, bfloat16 products"


TEACHER = Case(products="float32")
BEST = Case(recipe=(BFloat16Table(), BFloat16Linear()))
CASES = (
    BEST,
    Case(recipe=(Int8Table(), Fp8Linear())),
    Case(recipe=(Int8Table(), Int8Linear())),
    Case(recipe=(Int8Table(), Int4Linear())),
    Case(recipe=(Int8Table(), SparseLinear())),
    TEACHER,
    Case(),
    Case(recipe=(Int8Table(), BFloat16Linear())),
    Case(recipe=(Int8Table(), Int8Linear(activations="none"))),
    Case(recipe=(Int4Table(keep="rows"), Int4Linear()), trained_only=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How an answer is computed."""

    name: str
    compile: bool = False
    capture: bool = False


LAUNCHED = Way(name="launched")
FASTEST = Way(name="compiled, captured", compile=True, capture=True)
WAYS = (LAUNCHED, Way(name="captured", capture=True), Way(name="compiled", compile=True), FASTEST)


@dataclass(kw_only=True, slots=True)
class Subject:
    """A network and what it is asked."""

    name: str
    trained: bool  # then its quality is measured, else it is compiled, too: there is no time for both
    teacher: Network
    history_by_batch: Mapping[int, Sequence[History]]
    bench: Workbench
    made: dict[Step, Network] = field(default_factory=dict)

    def network(self, recipe: Recipe) -> Network:
        """On the CPU. The first step's result is used again."""
        if not recipe:
            return self.teacher
        first, *rest = recipe
        if first not in self.made:
            self.made = {first: apply(first, self.teacher, self.bench)}
        network = self.made[first]
        for step in rest:
            network = apply(step, network, self.bench)
        return network


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Medians and the 99th percentile, ms: as the host waits, and between two events of the device."""

    p50_ms: float
    p99_ms: float
    device_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is measured, where, and until when something may be compiled."""

    size: Size
    device: str
    compile_until_s: float  # of time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def ways(self, trained: bool) -> tuple[Way, ...]:
        """A CPU only launches: compiling for it takes minutes."""
        return tuple(way for way in WAYS if self.on_gpu or way is LAUNCHED if not (trained and way.compile))


def main() -> None:
    started_s = time.monotonic()
    chosen = _options()
    size = QUICK if chosen.quick else FULL
    torch._dynamo.config.recompile_limit = COMPILATIONS
    limits = Limits(size=size, device=chosen.device, compile_until_s=started_s + chosen.compile_until)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = _store(chosen.data, chosen.quick, Path(folder))
        for part in chosen.only or PARTS:
            subject = PARTS[part](store, chosen.bundle, limits, Path(folder))
            print(f"{subject.name} begins after {time.monotonic() - started_s:.0f} s", flush=True)
            gc.collect()
            gc.freeze()  # recording a graph collects garbage, which is slow among so many objects
            for more in measured(subject, limits):
                rows += more
                _publish(rows, chosen)  # what is known so far
    print(_publish(rows, chosen))
    print(f"{time.monotonic() - started_s:.0f} s in all", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, help="where to write the front of the trained network as a page")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "ml-100k", help="a store, as `data prepare` makes")
    parser.add_argument("--bundle", help="a float32 network of that store; without it one is trained here")
    parser.add_argument("--compile-until", type=float, default=170.0, help="seconds; recipes after that go uncompiled")
    return parser.parse_args()


def _store(data: Path, quick: bool, folder: Path) -> Store:
    if quick and not data.is_dir():
        return make_store(folder / "store", replace(TINY, n_items=200), 64)
    return open_store(data)


def _publish(rows: Sequence[dict[str, Any]], chosen: argparse.Namespace) -> str:
    """Writes the files; the lines that tell of checks, as the table is too wide for a terminal."""
    found = frontier(rows)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        publish("gpu_compression", [_shown(row, found) for row in rows], checks(rows), chosen.json)
    if chosen.report and found:
        why = f"On a GPU: {found.why}"
        chosen.report.write_text(frontier_page(found.trials, found.teacher, why, BUDGET), encoding="utf-8")
    return "\n".join(line for line in told.getvalue().splitlines() if line.startswith(("holds", "MISSED")))


# What is asked


def trained_subject(store: Store, bundle: str | None, limits: Limits, folder: Path) -> Subject:
    """The network of a bundle, or one trained on the device with the settings that suit the store."""
    if bundle:
        teacher = open_bundle(bundle).network()
    else:
        run = recommended(store, limits.size.epochs)
        if limits.size is QUICK:
            encoder = EncoderConfig(width=64, blocks=1, max_length=16)
            run = replace(run, network=NetworkConfig(encoder=encoder))
        run = replace(run, name="teacher", data=store.path, storage=folder, evaluation=EVALUATION)
        loop = Loop(run, store, LocalHost(run.folder, device=limits.device))
        loop.train()
        teacher = Network(run.network, store.n_items)
        teacher.load_state_dict({name: tensor.cpu() for name, tensor in loop.best_weights.items()})
        print(f"trained {int(loop.best.epoch)} epochs", flush=True)
    teacher = teacher.eval().requires_grad_(False)
    bench = _bench(teacher, store, limits, folder)
    cases = split(LeaveOneOut(), store.sequences).test
    history_P = histories(store.sequences, cases, teacher.config.encoder.max_length)
    order_P = np.random.default_rng(0).permutation(len(history_P.item_BT))
    drawn = {
        batch: [history_P.take(np.resize(np.roll(order_P, -batch * turn), batch)) for turn in range(DRAWN)]
        for batch in limits.size.batches
    }
    return Subject(name="trained", trained=True, teacher=teacher, history_by_batch=drawn, bench=bench)


def large_subject(store: Store, _bundle: str | None, limits: Limits, folder: Path) -> Subject:
    """Random weights over a large catalogue; histories as long as among 20 million film ratings."""
    size, generator = limits.size, np.random.default_rng(0)

    def drawn(batch: int) -> History:
        length_B = np.clip(np.exp(generator.normal(np.log(68), 1.1, batch)), 20, size.max_length).astype(np.int64)
        item_BT = generator.integers(1, size.items + 1, (batch, size.max_length))
        item_BT[np.arange(size.max_length) < size.max_length - length_B[:, None]] = 0
        return History(torch.from_numpy(item_BT))

    history_by_batch = {batch: [drawn(batch) for _ in range(DRAWN)] for batch in size.batches}
    name = f"{size.width} x {size.blocks} over {size.items:,} items"
    teacher = _random(limits, history_by_batch[size.batches[0]][0])
    bench = _bench(teacher, store, limits, folder)
    return Subject(name=name, trained=False, teacher=teacher, history_by_batch=history_by_batch, bench=bench)


def _bench(teacher: Network, store: Store, limits: Limits, folder: Path) -> Workbench:
    return Workbench(
        teacher=teacher, store=store, split=LeaveOneOut(), evaluation=EVALUATION, scratch=folder, device=limits.device
    )


PARTS = {"trained": trained_subject, "large": large_subject}


def _random(limits: Limits, history: History) -> Network:
    """With attention without a grid where the device does that."""
    size = limits.size
    attentions: tuple[Literal["jagged", "sdpa"], ...] = ("jagged", "sdpa") if limits.on_gpu else ("sdpa",)
    for attention in attentions:
        torch.manual_seed(0)
        block = BlockConfig(heads=size.heads, attention=attention)
        encoder = EncoderConfig(width=size.width, blocks=size.blocks, max_length=size.max_length, block=block)
        network = Network(NetworkConfig(encoder=encoder), size.items).eval().requires_grad_(False)
        try:
            Answerer(_there(network, limits), AnswerConfig()).answer(history)
        except Exception as error:  # noqa: BLE001 - whatever a device raises
            print(f"{attention} failed: {_reason(error)}", flush=True)
        else:
            break
    return network


def _there(network: Network, limits: Limits) -> Network:
    """A copy on the device."""
    return copy.deepcopy(network).to(limits.device)


# What is measured


class Quality:
    """Ranks of the float32 teacher, as it scores in float32, and of others beside them."""

    def __init__(self, subject: Subject, limits: Limits) -> None:
        self._store, self._length = subject.bench.store, subject.teacher.config.encoder.max_length
        cut = split(LeaveOneOut(), self._store.sequences)
        self._cases = {"": cut.test, "validation_": cut.validation}
        self._teacher = self._ranks(_there(subject.teacher, limits))
        self.teacher = self._metrics(self._teacher)

    def of(self, answerer: Answerer) -> dict[str, float]:
        """Metrics by name, with `_se`, and test differences to the teacher by user with their 95 % interval."""
        ranks = self._ranks(answerer)
        return self._metrics(ranks) | paired(ranks[""], self._teacher[""], EVALUATION)

    def _ranks(self, scorer: Scorer) -> dict[str, Int64]:
        return {
            prefix: rank(scorer, self._store.sequences, cases, EVALUATION, max_length=self._length, tops=False).rank_C
            for prefix, cases in self._cases.items()
        }

    def _metrics(self, ranks: Mapping[str, Int64]) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix, rank_C in ranks.items():
            means, errors = rank_metrics(rank_C, EVALUATION)
            found |= {f"{prefix}{name}": value for name, value in means.items()}
            found |= {f"{prefix}{name}_se": value for name, value in errors.items()}
        return found


def measured(subject: Subject, limits: Limits) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case. The first one's network is what the others are compared with, beside the teacher."""
    quality = Quality(subject, limits) if subject.trained else None
    references: dict[str, Answerer] = {}
    with contextlib.suppress(Exception):
        references["teacher"] = _ready(subject, TEACHER, _there(subject.teacher, limits), LAUNCHED, limits)
    for case in cases_of(subject):
        _forget(limits)
        rows = _rows(subject, case, quality, references, limits)
        _print(rows)
        yield rows


def cases_of(subject: Subject) -> list[Case]:
    """Where compiling ends with the time those that are asked most come first, else the rarest products last."""
    if subject.trained:
        return sorted(CASES, key=lambda case: bool({Int4Linear(), SparseLinear()} & set(case.recipe)))
    return [case for case in CASES if not case.trained_only]


def _rows(
    subject: Subject, case: Case, quality: Quality | None, references: dict[str, Answerer], limits: Limits
) -> list[dict[str, Any]]:
    """A row for each way and batch. Nothing that goes wrong with a recipe ends the run."""
    try:
        network = _there(subject.network(case.recipe), limits)
    except Exception as error:  # noqa: BLE001 - whatever a device or a step raises
        return [_row(subject, case, LAUNCHED, 0, failed=_reason(error))]
    known = {"weights_mb": 1e-6 * sum(tensor.nbytes for tensor in network.state_dict().values())}
    running: dict[str, Answerer] = {}
    failed: dict[str, str] = {}
    ways = limits.ways(subject.trained)
    for way in ways:
        try:
            running[way.name] = _ready(subject, case, network, way, limits)
        except Exception as error:  # noqa: BLE001
            failed[way.name] = _reason(error)
    if LAUNCHED.name in running:
        try:
            known |= _worth(running[LAUNCHED.name], quality)
        except Exception as error:  # noqa: BLE001
            print(f"{case.name}: quality failed: {_reason(error)}", flush=True)
    if case is BEST and running:
        references["best"] = list(running.values())[-1]
    rows = []
    for batch, drawn in subject.history_by_batch.items():
        times = timed(running | references, drawn, limits, failed)
        agrees = _agreements(running, drawn[0], failed)
        for way in ways:
            row = _row(subject, case, way, batch, failed=failed.get(way.name, "")) | known
            rows.append(row | _told(times, way) | {"agrees": agrees.get(way.name)})
    return rows


def _ready(subject: Subject, case: Case, network: Network, way: Way, limits: Limits) -> Answerer:
    """Of a network on the device, with all that is asked compiled and recorded."""
    if way.compile and time.monotonic() > limits.compile_until_s:
        raise TimeoutError("not compiled, the time was over")
    config = AnswerConfig(
        products=case.products, compile=way.compile, capture=way.capture, batches=tuple(subject.history_by_batch)
    )
    answerer = Answerer(network, config)
    for drawn in subject.history_by_batch.values():
        for history in drawn:
            answerer.answer(history)
    _wait(limits)
    return answerer


def _worth(answerer: Answerer, quality: Quality | None) -> dict[str, Any]:
    known: dict[str, Any] = {"resident_mb": 1e-6 * answerer.resident_bytes()}
    if quality is None:
        return known
    found = quality.of(answerer)
    return known | {name: found[name] for name in _QUALITY} | {"quality": found, "teacher": quality.teacher}


def timed(
    answerers: Mapping[str, Answerer], drawn: Sequence[History], limits: Limits, failed: dict[str, str]
) -> dict[str, Times]:
    """Each answers in turn, once a round, so that a slow moment meets all. What fails is noted and left out."""
    size, left = limits.size, dict(answerers)
    host_ms: dict[str, list[float]] = {name: [] for name in answerers}
    device_ms: dict[str, list[float]] = {name: [] for name in answerers}
    for turn in range(size.warm_up + size.rounds):
        for name in list(left)[:: 1 if turn % 2 else -1]:  # nobody always goes first
            try:
                taken_ms = _once(left[name], drawn[turn % len(drawn)], limits)
            except Exception as error:  # noqa: BLE001
                failed[name] = _reason(error)
                del left[name]
                continue
            if turn >= size.warm_up:
                host_ms[name].append(taken_ms[0])
                device_ms[name].append(taken_ms[1])
    return {
        name: Times(
            p50_ms=float(np.median(host_ms[name])),
            p99_ms=float(np.percentile(host_ms[name], 99)),
            device_ms=float(np.median(device_ms[name])),
        )
        for name in left
    }


def _once(answerer: Answerer, history: History, limits: Limits) -> tuple[float, float]:
    """ms as the host waits for the answer, and between events of the device around the work."""
    _wait(limits)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if limits.on_gpu else []
    started_s = time.perf_counter()
    for event in events[:1]:
        event.record()
    item_BK, score_BK = answerer.answer(history)
    for event in events[1:]:
        event.record()
    item_BK.cpu(), score_BK.cpu()
    host_ms = 1e3 * (time.perf_counter() - started_s)
    return host_ms, events[0].elapsed_time(events[1]) if events else host_ms


def _agreements(running: Mapping[str, Answerer], history: History, failed: dict[str, str]) -> dict[str, float]:
    """Share of the items that a way answers and kernels launched one by one do, too."""
    answers: dict[str, Int64] = {}
    for name in (name for name in running if name not in failed):
        try:
            answers[name] = running[name].answer(history)[0].cpu().numpy()
        except Exception as error:  # noqa: BLE001
            failed[name] = _reason(error)
    if LAUNCHED.name not in answers:
        return {}
    return {name: common_share(item_BK, answers[LAUNCHED.name]) for name, item_BK in answers.items()}


def common_share(own_BK: Int64, other_BK: Int64) -> float:
    """Mean over rows of the share of items that are in the other's row, too."""
    pairs = zip(own_BK, other_BK, strict=True)
    return float(np.mean([len(np.intersect1d(own_K, other_K)) / len(np.unique(own_K)) for own_K, other_K in pairs]))


def _forget(limits: Limits) -> None:
    """Graphs and memory of the recipe before. Compiled code stays: a graph of it is still replayed."""
    gc.collect()
    if limits.on_gpu:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def _wait(limits: Limits) -> None:
    if limits.on_gpu:
        torch.cuda.synchronize()


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    kind = REFUSED if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0] if lines else ''}"[:REASON_CHARACTERS]


# What is told

REFUSED = "refused: "  # on purpose, and so no failure
_QUALITY = ("hr@10", "validation_ndcg@10", "ndcg@10", "ndcg@10_diff", "ndcg@10_diff_low", "ndcg@10_diff_high")
_HIDDEN = ("quality", "teacher")
_NUMBERS = ("p50_ms", "p99_ms", "device_ms", "times_teacher", "times_best", "agrees", "resident_mb", "weights_mb")


def _row(subject: Subject, case: Case, way: Way, batch: int, failed: str) -> dict[str, Any]:
    told = {"network": subject.name, "recipe": case.name, "way": way.name, "batch": batch}
    return told | dict.fromkeys((*_NUMBERS, *_QUALITY, *_HIDDEN)) | {"failed": failed}


def _told(times: Mapping[str, Times], way: Way) -> dict[str, Any]:
    """Of a way that was timed: how long it takes, and how many times as long the references do."""
    own = times.get(way.name)
    if own is None:
        return {}
    others = {f"times_{name}": times[name].p50_ms / own.p50_ms for name in ("teacher", "best") if name in times}
    return {"p50_ms": own.p50_ms, "p99_ms": own.p99_ms, "device_ms": own.device_ms} | others


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each batch: ms of each way."""
    for batch in dict.fromkeys(row["batch"] for row in rows):
        mine = [row for row in rows if row["batch"] == batch]
        told = [f"{row['way']} {row['p50_ms']:.3f}" if row["p50_ms"] else row["failed"][:60] for row in mine]
        worth = "" if mine[0]["ndcg@10"] is None else f"; NDCG@10 {mine[0]['ndcg@10']:.4f}"
        print(f"{mine[0]['network']}, {mine[0]['recipe']}, batch {batch}: {'; '.join(told)}{worth}", flush=True)


def _shown(row: Mapping[str, Any], found: "Frontier | None") -> dict[str, Any]:
    trial = found.trial(row) if found else {}
    marks = {mark: bool(trial.get(mark)) for mark in ("on_front", "chosen")}
    return {name: value for name, value in row.items() if name not in _HIDDEN} | marks


def checks(rows: Sequence[Mapping[str, Any]]) -> list[Check]:
    """What runs, what is kept, and what graphs and compilers are worth."""
    failed = [row for row in rows if row["failed"] and not row["failed"].startswith(REFUSED)]
    found = [Check(name="rows that failed", value=len(failed), target=0, unit="rows", holds=not failed)]
    for way, target in (("captured", 99.0), ("compiled", 90.0), ("compiled, captured", 90.0)):
        agree = [100 * row["agrees"] for row in rows if row["way"] == way and row["agrees"] is not None]
        if agree:  # compiled code rounds elsewhere, and a random network's scores lie close to each other
            name = f"items that are answered {way} as launched, the least"
            found.append(Check(name=name, value=min(agree), target=target, unit="%", holds=min(agree) >= target))
    for name, row in {row["recipe"]: row for row in rows if row["quality"]}.items():
        kept = 100 * (1 - row["quality"]["ndcg@10_loss"])
        found.append(Check(name=f"{name}: NDCG@10 kept", value=kept, target=99, unit="%", holds=kept >= 99))
    for place, row in _fastest(rows).items():
        value = row["times_teacher"]
        found.append(
            Check(
                name=f"{place[0]}: the fastest at batch {place[1]} against float32, launched",
                value=value,
                target=2,
                unit="x",
                holds=value >= 2,
            )
        )
    return found


def _fastest(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """By network and batch, the row that beats the float32 teacher the most."""
    known = sorted((row for row in rows if row["times_teacher"]), key=lambda row: float(row["times_teacher"]))
    return {(row["network"], row["batch"]): row for row in known}


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """The trained network's recipes at batch 1, each computed its fastest way, and which of them is chosen."""

    trials: list[dict[str, Any]]
    teacher: dict[str, Any]
    why: str

    def trial(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The trial that a row is; empty where it is none."""
        name = _name(row) if row["quality"] and row["batch"] == 1 else None
        return next((trial for trial in self.trials if trial["recipe"] == name), {})


def frontier(rows: Sequence[Mapping[str, Any]]) -> Frontier | None:
    """None before the teacher has been measured."""
    known = [row for row in rows if row["quality"] and row["batch"] == 1 and row["p50_ms"]]
    fastest = {row["recipe"]: row for row in sorted(known, key=lambda row: -float(row["p50_ms"]))}
    trials = [_trial(row) for row in fastest.values()]
    teacher = next((row for row in known if row["recipe"] == AS_TRAINED and row["way"] == LAUNCHED.name), None)
    if teacher is None:
        return None
    base = _trial(teacher)
    base |= teacher["teacher"]  # as it scores in float32
    measures = [Trial(name=trial["recipe"], metrics=_chosen_by(trial)) for trial in trials]
    choice = choose(measures, parse_budget(BUDGET), _chosen_by(base), ("p50_ms", "resident_bytes"))
    best = {trial.name for trial in front(measures, _OBJECTIVES)}
    chosen = choice.trial.name if choice.trial else None
    for trial in trials:
        trial |= {"on_front": trial["recipe"] in best, "chosen": trial["recipe"] == chosen}
    return Frontier(trials=trials, teacher=base, why=choice.why)


_OBJECTIVES: dict[str, Direction] = {"ndcg@10": "max", "p50_ms": "min", "resident_bytes": "min"}


def _chosen_by(trial: Mapping[str, Any]) -> dict[str, float]:
    """As in a sweep, by validation."""
    return {name: float(trial[name]) for name in _OBJECTIVES} | {"ndcg@10": float(trial["validation_ndcg@10"])}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['recipe']}, {row['way']}"


def _trial(row: Mapping[str, Any]) -> dict[str, Any]:
    """As a sweep's rows are; bytes are those of the tensors."""
    return {
        "recipe": _name(row),
        "status": "done",
        "bytes": 1e6 * row["weights_mb"],
        "resident_bytes": 1e6 * row["resident_mb"],
        "p50_ms": row["p50_ms"],
        "p99_ms": row["p99_ms"],
        "users_per_s": 1e3 / row["p50_ms"],
        "speedup_b1": row["times_teacher"] or 0.0,
        **row["quality"],
    }


if __name__ == "__main__":
    main()
