"""The frontier of quality, latency and size on two data sets, and whether it meets what was aimed at.

python -m benchmarks.compression [--quick] [--json FILE] [--work FOLDER]; data: MovieLens-100K, fetched on the first
call, and a sample of the sessions of retailrocket with at least 30,000 items.

Each set has a float32 teacher, trained here, and one sweep over it: rounded tables and layers, pruning, a distilled
student, the same student trained alone, and both rounded. With --work the stores, teachers and finished trials are
kept there, and the same command goes on.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.quality.sets import open_sets
from benchmarks.result import Check, publish
from elasticrec.artifact.bundle import open_bundle, write_bundle
from elasticrec.artifact.manifest import MANIFEST
from elasticrec.artifact.seen import BundleEvaluation
from elasticrec.cli.connection import connected
from elasticrec.compression.distil import Distil
from elasticrec.compression.factorise import LowRankTable
from elasticrec.compression.finetune import FineTune
from elasticrec.compression.linears import Int8Linear
from elasticrec.compression.measure import MeasureConfig
from elasticrec.compression.prune import Prune
from elasticrec.compression.quantize import Int4Table, Int8Table
from elasticrec.compression.recipe import Recipe, label
from elasticrec.compression.space import SweepConfig
from elasticrec.data.prepare import PrepareConfig, prepare
from elasticrec.data.sequences import Store, is_store, open_store
from elasticrec.evaluation.ranking import EvaluationConfig
from elasticrec.model.block import BlockConfig
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.loss import FullSoftmax
from elasticrec.model.network import Network, NetworkConfig
from elasticrec.model.sampled import AnyLoss, Popularity, SampledSoftmax
from elasticrec.training.host import LocalHost
from elasticrec.training.loop import Loop
from elasticrec.training.recipe import recommended

ROOT = Path(__file__).parents[1]
THREADS = 1  # of training; on two cores that others use too, a second one made it slower
SMALL, LARGE = "ml-100k", "retailrocket"
SESSIONS = 34_000  # of retailrocket; fewer would hold less than 30,000 items
BUDGET = "ndcg@10>=0.99*teacher, bytes<=0.125*teacher, p50_ms<=0.5*teacher, p50_ms_b32<=0.5*teacher"
WEIGHTS_ALONE = Int8Linear(activations="none", memory="float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A data set, its teacher, the student that is distilled and trained alone, and the rest of the sweep."""

    dataset: str
    encoder: EncoderConfig
    epochs: int
    loss: AnyLoss
    student: Distil
    alone: tuple[Distil, ...]
    others: tuple[Recipe, ...]
    remove_seen: bool
    sessions: int | None = None

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        single: list[Recipe] = [(self.student,), *((alone,) for alone in self.alone)]
        return ((), (Int8Table(),), (Int4Table(),), *single, packed((self.student,)), *self.others)


def packed(trained: Recipe) -> Recipe:
    """The network in int8, table and layers, which a CPU unpacks once."""
    return (*trained, WEIGHTS_ALONE, Int8Table(memory="float32"))


def rounded(trained: Recipe) -> tuple[Recipe, ...]:
    """What else a trained network is rounded to."""
    return (
        (*trained, Int8Table()),
        (*trained, WEIGHTS_ALONE, Int4Table()),
        (*trained, Int8Linear(), Int8Table()),
    )


def alone(student: Distil, dropout: float, learning_rate: float) -> Distil:
    """The same student from random weights, with the hard loss alone and its own regularisation."""
    return replace(student, start="scratch", soft_share=0.0, dropout=dropout, learning_rate=learning_rate)


def small(quick: bool) -> Plan:
    """943 users, 1,682 items, long histories: the encoder is most of it."""
    epochs = 6 if quick else 40
    student = Distil(width=60, blocks=2, heads=2, epochs=epochs, soft_share=0.9, dropout=0.2)
    pruned = (Prune(heads=0.25, channels=0.5, blocks=1), FineTune(epochs=2 if quick else 6))
    return Plan(
        dataset=SMALL,
        encoder=EncoderConfig(width=128, blocks=3, max_length=50, dropout=0.5, block=BlockConfig(heads=4)),
        epochs=6 if quick else 70,
        loss=FullSoftmax(mask_seen=True),
        student=student,
        alone=(alone(student, 0.2, 2e-3),),
        others=(
            *rounded((student,)),
            packed((replace(student, width=64, blocks=1),)),
            pruned,
            packed(pruned),
        ),
        remove_seen=True,
    )


def large(quick: bool) -> Plan:
    """Short sessions, over 30,000 items: the table is nearly all of it."""
    epochs = 1 if quick else 12
    student = Distil(width=32, blocks=1, heads=1, epochs=epochs, soft_share=0.9, temperature=1.0)
    narrow = LowRankTable(rank=64)
    return Plan(
        dataset=LARGE,
        encoder=EncoderConfig(width=128, blocks=2, max_length=16, dropout=0.5, block=BlockConfig(heads=4)),
        epochs=1 if quick else 12,
        loss=SampledSoftmax(source=Popularity(negatives=2048)),
        student=student,
        alone=(alone(student, 0.2, 2e-3),),
        others=((narrow, Int8Table()),),
        remove_seen=False,
        sessions=SESSIONS,
    )


def store_of(plan: Plan, work: Path, data: Path) -> Store:
    """The prepared set, or a sample of its sessions."""
    if plan.sessions is None:
        return open_sets((plan.dataset,), work / "stores", data)[0].store
    folder = work / "stores" / f"{plan.dataset}-{plan.sessions}"
    if not (folder.is_dir() and is_store(folder)):
        clicks = pq.read_table(data / plan.dataset / "train_sessions.parquet")
        sessions = np.unique(clicks["session_id"].to_numpy())
        chosen = np.random.default_rng(0).permutation(sessions)[: plan.sessions]
        file = work / f"{folder.name}.parquet"
        pq.write_table(clicks.filter(pc.is_in(clicks["session_id"], pa.array(chosen))), file)
        prepare(PrepareConfig(interactions=(str(file),), out=folder, user="session_id"))
    return open_store(folder)


def teacher_of(plan: Plan, store: Store, work: Path) -> str:
    """Trains the float32 teacher in this process, or finds it: the folder of its bundle."""
    folder = work / plan.dataset / "teacher"
    if (folder / MANIFEST).exists():
        return str(folder)
    run = recommended(store, plan.epochs)
    run = replace(
        run,
        name="training",
        data=store.path,
        storage=work / plan.dataset,
        network=NetworkConfig(encoder=plan.encoder),
        evaluation=EvaluationConfig(ks=(10,), remove_seen=plan.remove_seen),
        validation=replace(run.validation, every_epochs=max(1, plan.epochs // 20), patience=5),
        loss=plan.loss,
        plan=replace(run.plan, batch_users=128),
    )
    loop = Loop(run, store, LocalHost(run.folder))
    loop.train()
    network = Network(run.network, store.n_items)
    network.load_state_dict(loop.best_weights)
    network.eval().requires_grad_(False)
    lineage = {"dataset": store.fingerprint, "command": "benchmarks.compression", "epoch": int(loop.best.epoch)}
    write_bundle(folder, network, store.items(), name=plan.dataset, version="teacher", lineage=lineage)
    return str(folder)


def sweep_of(plan: Plan, bundle: str, store: Store, work: Path, quick: bool) -> dict[str, Any]:
    """Rows, teacher and choice of one sweep."""
    from elasticrec.compression.sweep import sweep

    config = SweepConfig(
        recipes=plan.recipes,
        budget=BUDGET,
        measure=MeasureConfig(rounds=60 if quick else 200),
        evaluation=BundleEvaluation(ks=(10,), remove_seen=plan.remove_seen),
        cpus_per_trial=float(THREADS),
    )
    result = sweep(
        config,
        bundle,
        store.path,
        work / plan.dataset / "sweep",
        progress=lambda name, status: print(f"{plan.dataset}: {name} {status}", flush=True),
    )
    print(f"{plan.dataset}: {result.choice.why}", flush=True)
    return {"rows": result.rows, "teacher": result.teacher, "chosen": result.chosen, "why": result.choice.why}


def table_rows(plan: Plan, bundle: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What the table shows: the teacher first, then a row a trial."""
    teacher = found["teacher"] | {"recipe": "teacher", "status": "done", "bundle": bundle, "chosen": False}
    return [_row(plan.dataset, row, found["teacher"]) for row in (teacher, *found["rows"])]


def _row(dataset: str, row: dict[str, Any], teacher: dict[str, float]) -> dict[str, Any]:
    told = {"set": dataset, "recipe": row["recipe"]}
    if row["status"] != "done":
        return told | dict.fromkeys(_NUMBERS) | {"chosen": f"{row['status']}: {row['reason']}"}
    parameters, table_bytes = sizes(row["bundle"])
    relative = {f"{name}": row[f"{part}ndcg@10"] / teacher[f"{part}ndcg@10"] for name, part in _QUALITY.items()}
    numbers = {
        "parameters": parameters,
        "table_bytes": table_bytes,
        "bytes": int(row["bytes"]),
        "resident_bytes": int(row["resident_bytes"]),
        **{name: row[name] for name in ("p50_ms", "p99_ms", "users_per_s", "p50_ms_b32", "p99_ms_b32")},
        "speedup_b1": row["speedup_b1"],
        "speedup_b32": row["speedup_b32"],
        "hr@10": row["hr@10"],
        "ndcg@10": row["ndcg@10"],
        "ndcg@10_se": row["ndcg@10_se"],
        "validation_ndcg@10": row["validation_ndcg@10"],
        "diff_low": row.get("ndcg@10_diff_low", 0.0),
        "diff_high": row.get("ndcg@10_diff_high", 0.0),
        **relative,
    }
    return told | numbers | {"chosen": "chosen" if row["chosen"] else ""}


_QUALITY = {"test_of_teacher": "", "validation_of_teacher": "validation_"}
_NUMBERS = (
    *("parameters", "table_bytes", "bytes", "resident_bytes", "p50_ms", "p99_ms", "users_per_s", "p50_ms_b32"),
    *("p99_ms_b32", "speedup_b1", "speedup_b32", "hr@10", "ndcg@10", "ndcg@10_se", "validation_ndcg@10"),
    *("diff_low", "diff_high", "test_of_teacher", "validation_of_teacher"),
)


def sizes(bundle: str) -> tuple[int, int]:
    """Numbers of a network that training found, and bytes of its item table."""
    network = open_bundle(bundle, verify=False).network()
    parameters = sum(tensor.numel() for name, tensor in network.state_dict().items() if "scale_" not in name)
    return parameters, sum(tensor.nbytes for tensor in network.encoder.items.state_dict().values())


def checks(plan: Plan, rows: list[dict[str, Any]]) -> Iterator[Check]:
    """The targets of the issue for one set, in its words."""
    known = {row["recipe"]: row for row in rows}
    asked: list[Recipe] = [(Int8Table(),), (Int4Table(),), (plan.student,), *((one,) for one in plan.alone)]
    if missing := [name for name in map(label, asked) if known[name]["bytes"] is None]:
        name = f"{plan.dataset}: trials that the targets speak of and that are not done ({', '.join(missing)})"
        yield _at_most(name, len(missing), 0, "trials")
        return
    for step, largest in ((Int8Table(), 0.003), (Int4Table(), 0.01)):
        loss = 1 - known[label((step,))]["test_of_teacher"]
        name = f"{plan.dataset}: {step.kind.replace('_', ' ')} <= {100 * largest:g} % relative NDCG@10 loss"
        yield _at_most(name, 100 * loss, 100 * largest, "%")
    share = known["int4_table"]["table_bytes"] / known["teacher"]["table_bytes"]
    yield _at_most(f"{plan.dataset}: the int4 table <= 15 % of fp32's bytes", 100 * share, 15, "%")
    student = known[label((plan.student,))]
    share = student["parameters"] / known["teacher"]["parameters"]
    yield _at_most(f"{plan.dataset}: a distilled student of <= 1/4 the parameters", share, 0.25, "of the teacher's")
    name = f"{plan.dataset}: it keeps >= 97 % of the teacher's NDCG@10"
    yield _at_least(name, 100 * student["test_of_teacher"], 97, "%")
    best = max((known[label((other,))] for other in plan.alone), key=lambda row: row["validation_ndcg@10"])
    name = f"{plan.dataset}: it beats the same student trained alone (NDCG@10 over its)"
    yield _at_least(name, student["ndcg@10"] / best["ndcg@10"], 1, "times")
    yield from _checks_of_choice(plan, rows)


def _checks_of_choice(plan: Plan, rows: list[dict[str, Any]]) -> Iterator[Check]:
    teacher, chosen = rows[0], next((row for row in rows if row["chosen"] == "chosen"), None)
    if chosen is None:
        yield Check(name=f"{plan.dataset}: a bundle is chosen", value=0, target=1, unit="bundles", holds=False)
        return
    what = f"{plan.dataset}: the chosen bundle is"
    yield _at_least(f"{what} >= 8x smaller", teacher["bytes"] / chosen["bytes"], 8, "times")
    yield _at_least(f"{what} >= 2x faster at batch 1", chosen["speedup_b1"], 2, "times")
    yield _at_least(f"{what} >= 2x faster at batch 32", chosen["speedup_b32"], 2, "times")
    name = f"{what} at >= 99 % of the teacher's NDCG@10"
    yield _at_least(f"{name} (validation, by which it was chosen)", 100 * chosen["validation_of_teacher"], 99, "%")
    yield _at_least(f"{name} (test)", 100 * chosen["test_of_teacher"], 99, "%")


def _at_most(name: str, value: float, target: float, unit: str) -> Check:
    return Check(name=name, value=value, target=target, unit=unit, holds=value <= target)


def _at_least(name: str, value: float, target: float, unit: str) -> Check:
    return Check(name=name, value=value, target=target, unit=unit, holds=value >= target)


def main() -> None:
    chosen = _options()
    torch.set_num_threads(THREADS)
    rows, held = [], []
    with _folder(chosen.work) as work, connected(num_cpus=2):
        for plan in (small(chosen.quick), large(chosen.quick)):
            if plan.dataset not in chosen.sets:
                continue
            store = store_of(plan, work, chosen.data)
            bundle = teacher_of(plan, store, work)
            found = table_rows(plan, bundle, sweep_of(plan, bundle, store, work, chosen.quick))
            rows += found
            held += list(checks(plan, found))
            if plan.dataset == LARGE:
                held.append(_at_least(f"{LARGE}: items of the set", store.n_items, 30_000, "items"))
    publish("compression", rows, held, chosen.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few epochs: the same shape, no figures to keep")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="folder for stores, teachers and trials; goes on from what is there")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--sets", nargs="+", default=[SMALL, LARGE], choices=[SMALL, LARGE])
    return parser.parse_args()


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work.absolute()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


if __name__ == "__main__":
    main()
