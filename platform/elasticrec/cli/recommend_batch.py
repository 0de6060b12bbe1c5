"""`elasticrec recommend-batch`: a bundle and a store in, the best items of every user out, through Ray Data.

Ray Data hands numbers of parts to actors; each maps the store, answers the part's users a batch at a time and writes
their file. No list of users or answers is in anybody's memory.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.manifest import render
from elasticrec.artifact.registry import resolve_reference
from elasticrec.cli.connection import connected
from elasticrec.cli.progress import working
from elasticrec.data.sequences import open_store
from elasticrec.errors import ConfigError
from elasticrec.serving.batch import BatchRecommender
from elasticrec.serving.parts import Asked, growing_folder, part_file, write_part


def recommend_batch(
    bundle: Annotated[str, tyro.conf.Positional],
    data: Path,
    out: Path,
    k: int = 10,
    batch_users: int = 256,
    part_users: int = 8_192,
    workers: int | None = None,
) -> None:
    """Writes the best items of every user of a store to parquet: user_id, rank, item_id, score.

    A command that was killed goes on where it was when it is given again. Events on items that the bundle does not
    know are left out; a user without any other gets no rows.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
        data: the store with the users' histories; every node sees this path, and `out`.
        out: folder of parquet files; it appears when all of them are written, and replaces earlier ones.
        k: items a user.
        batch_users: users that one worker answers at a time.
        part_users: users a file; what is done again after a kill is at most one such file a worker.
        workers: at most so many; left out: one for each CPU that the cluster has.
    """
    for option, value in (("--k", k), ("--batch-users", batch_users), ("--part-users", part_users)):
        _check_positive(option, value)
    _check_positive("--workers", 1 if workers is None else workers)
    uri, store = resolve_reference(bundle), open_store(data)
    opened = open_bundle(uri)
    asked = Asked(
        bundle=hashlib.sha256(render(opened.manifest)).hexdigest(),
        store=store.fingerprint,
        users=store.n_users,
        k=k,
        batch_users=batch_users,
        part_users=part_users,
    )
    with growing_folder(out.absolute(), asked) as folder:
        missing = asked.missing(folder)
        there = len(asked.parts) - len(missing)
        text = f"recommending for {store.n_users:,} users" + (
            f"; {there} of {len(asked.parts)} parts are there" if there else ""
        )
        if missing:
            with connected(), working(text, total=len(missing)) as advance:
                _answer(asked, (uri, str(data.absolute())), folder, workers, advance)
    print(f"{out}: top {k} of {store.n_users:,} users")


class PartWriter:
    """Holds bundle and store; a call answers the users of one part and writes them. Ray Data starts one an actor."""

    def __init__(self, bundle: str, data: str, asked: Asked, folder: str) -> None:
        self._recommender = BatchRecommender(bundle, data, asked.k)
        self._asked, self._folder = asked, Path(folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = int(row["item"])
        tables = self._recommender.answers(self._asked.users_of(part), self._asked.batch_users)
        return {"part": part, "rows": write_part(part_file(self._folder, part), tables)}


def _answer(
    asked: Asked, places: tuple[str, str], folder: Path, workers: int | None, advance: Callable[[int], None]
) -> None:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False  # there is ours
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    missing = asked.missing(folder)
    actors = min(len(missing), workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    answered = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
        PartWriter,  # type: ignore[arg-type]  # Ray Data makes one in each actor
        fn_constructor_args=(*places, asked, str(folder)),
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
    )
    for _ in answered.iter_rows():
        advance(1)


def _check_positive(option: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{option} is {value}; it must be 1 or more")
