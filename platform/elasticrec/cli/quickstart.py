"""`elasticrec quickstart`: MovieLens-100K in; a trained, compressed and served model and its report out.

Each step is what a user would call by itself; this file only puts them in a row and measures.
"""

import contextlib
import dataclasses
import importlib.metadata
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.registry import Registry
from elasticrec.cli.client import Client, changes_by_event, time_requests
from elasticrec.cli.compress import sweep_here
from elasticrec.cli.connection import driver, settings
from elasticrec.cli.local_cluster import LocalCluster, LocalClusterConfig, local_cluster
from elasticrec.cli.progress import bar, working
from elasticrec.cli.publishing import publish_ready
from elasticrec.cli.report import write_report
from elasticrec.cli.service import deploy
from elasticrec.cli.tables import compression_table, quality_table, show
from elasticrec.cli.train import train_here
from elasticrec.columns import USER
from elasticrec.config import load
from elasticrec.data.prepare import prepare_dataset
from elasticrec.data.sequences import MANIFEST, Store, open_store
from elasticrec.serving.auth import create_key
from elasticrec.training.journal import EPOCHS, read
from elasticrec.training.run import RunConfig

DATASET = "ml-100k"
MODEL = "recommender"
LABEL = "production"
REQUESTS = 400


@dataclass(slots=True)
class Session:
    """Where a quickstart lies, and what it has found so far."""

    folder: Path
    run: RunConfig
    report: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        self.report["seconds"][name] = round(time.monotonic() - start_s, 2)


def quickstart(
    keep: bool = False, folder: Path = Path("runs/quickstart"), config: Path = Path("configs/ml-100k.yaml")
) -> None:
    """Fetches, trains, compresses, publishes and serves a model, and writes a report.

    A quickstart that was cut off goes on where it stopped; a finished one is done again from the start.

    Args:
        keep: leave the service up.
        folder: everything is written here.
        config: the training run; its name, data and storage are replaced.
    """
    start_s = time.monotonic()
    folder = folder.absolute()
    if (folder / "report.json").exists():
        _start_over(folder)
    run = dataclasses.replace(load(RunConfig, config), name="train", storage=folder, data=folder / "data")
    session = Session(folder, run, _start_of_report(config))
    store = _prepare(session)
    cpus = max(2, run.elastic.max_workers)
    cluster_config = LocalClusterConfig(
        num_cpus=cpus, train_slots=run.elastic.max_workers, haproxy=True, keep=keep, auth="token"
    )
    with contextlib.ExitStack() as stack:
        with bar("starting Ray"):
            cluster = stack.enter_context(local_cluster(cluster_config))
        with settings(cluster.env), driver(cluster.address):
            _train(session)
            _compress(session)
        url, key = _serve(session, cluster, store)
        session.report["seconds"]["total"] = round(time.monotonic() - start_s, 2)
        files = write_report(session.report, folder)
        _show(session, files, (url, key, cluster) if keep else None)


def _start_over(folder: Path) -> None:
    """Removes what a finished quickstart made; registry and events stay, since a kept service may use them."""
    for name in ("data", "train", "compressed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _start_of_report(config: Path) -> dict[str, Any]:
    packages = ("elasticrec", "ray", "torch", "numpy", "pyarrow")
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    command = f"elasticrec quickstart --config {config}"
    return {"dataset": DATASET, "command": command, "seconds": {}, "versions": versions}


def _prepare(session: Session) -> Store:
    with session.timed("prepare"):
        if (session.run.data / MANIFEST).exists():
            return open_store(session.run.data)
        return prepare_dataset(DATASET, session.run.data)


def _train(session: Session) -> None:
    with session.timed("train"):
        bundle = train_here(session.run)
    session.report["quality"] = bundle.manifest.metrics
    session.report["training"] = {"history": read(session.run.folder / EPOCHS)}


def _compress(session: Session) -> None:
    out = session.folder / "compressed"
    shutil.rmtree(out, ignore_errors=True)  # of a quickstart that was cut off
    with session.timed("sweep"):
        result = sweep_here(str(session.run.folder / "bundle"), session.run.data, out)
    chosen = result.chosen["bundle"] if result.chosen else str(session.run.folder / "bundle")
    session.report["compression"] = {
        "trials": result.rows,
        "chosen": result.chosen["recipe"] if result.chosen else "float32",
        "why": result.choice.why,
    }
    registry = Registry(str(session.folder / "registry"))
    version = publish_ready(registry, open_bundle(chosen), MODEL)
    registry.set_label(MODEL, LABEL, version, reason=result.choice.why)


def _serve(session: Session, cluster: LocalCluster, store: Store) -> tuple[str, str]:
    keys = session.folder / "serving" / "keys.json"
    key = create_key(keys, f"quickstart-{secrets.token_hex(4)}")
    arguments = {
        "bundle": f"{session.folder / 'registry'}#{MODEL}@{LABEL}",
        "events": str(session.folder / "serving" / "events.sqlite"),
        "seed": str(session.run.data),
        "keys": str(keys),
    }
    with session.timed("serve"):
        with bar("deploying with Ray Serve"):
            url = deploy(cluster, arguments)
        users = [str(user) for user in store.users().column(USER).to_pylist()]
        with Client(url, key) as client:
            with working(f"asking {REQUESTS} times", total=REQUESTS) as advance:
                session.report["serving"] = time_requests(client, users, REQUESTS, advance)
            session.report["event_changed_answer"] = changes_by_event(client, users[0])
    return url, key


def _show(session: Session, files: tuple[Path, Path], kept: tuple[str, str, LocalCluster] | None) -> None:
    report = session.report
    show(quality_table(report["quality"], title="Quality on MovieLens-100K, whole catalogue"))
    show(compression_table(report["compression"]["trials"]))
    show(_summary(session, files))
    _print_next(session, kept)


def _summary(session: Session, files: tuple[Path, Path]) -> Table:
    serving, seconds = session.report["serving"], session.report["seconds"]
    table = Table(title="This run", title_justify="left", show_header=False)
    table.add_row("requests", f"{serving['requests']} answered over HTTP, {serving['failed']} failed")
    table.add_row("latency", f"p50 {serving['p50_ms']:.2f} ms, p99 {serving['p99_ms']:.2f} ms, one connection")
    table.add_row("an event changed the answer", "yes" if session.report["event_changed_answer"] else "NO")
    table.add_row("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    table.add_row("report", f"{_shown(files[1])}, {_shown(files[0])}")
    table.add_row("training run", f"{_shown(session.run.folder)} (tensorboard --logdir it)")
    table.add_row("registry", f"{_shown(session.folder / 'registry')}#{MODEL}@{LABEL}")
    return table


def _print_next(session: Session, kept: tuple[str, str, LocalCluster] | None) -> None:
    root, data = _shown(session.folder / "registry"), _shown(session.run.data)
    lines = ["Go on with (in .venv/bin):"]
    lines += [f"  elasticrec recommend '{root}#{MODEL}@{LABEL}' --data {data} --user 1"]
    lines += [f"  elasticrec serve run '{root}#{MODEL}@{LABEL}' --seed {data}"]
    lines += ["  elasticrec data prepare --interactions YOUR.csv --user COL --item COL --time COL --out data/own"]
    if kept:
        url, key, cluster = kept
        lines += [f"The service is up on {url} (API: {url}/docs); its key: {key}"]
        body = '{"user_id": "1", "k": 5}'
        call = f"curl -s {url}/v1/recommend -H 'authorization: Bearer {key}' -H 'content-type: application/json'"
        lines += [f"  {call} -d '{body}'", f"  kill {cluster.pid}   # stops service and cluster"]
    Console(soft_wrap=True, highlight=False).print("\n".join(lines), markup=False)


def _shown(path: Path) -> str:
    """Relative to where the user stands, when it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
