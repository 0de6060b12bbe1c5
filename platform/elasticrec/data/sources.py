"""The name of a public data set in; its checked files in the cache, and how to read them, out.

Where the checksums come from: the sha256 of ml-100k.zip, ml-1m.zip and ml-20m.zip are those that TensorFlow Datasets
records (`url_checksums/movielens.txt`). Of ml-32m.zip only the md5 that GroupLens publishes beside it
(`ml-32m.zip.md5`) is known. Those of the three ml-100k files in the wheel of RecBole 1.2.1 were computed from the wheel
on PyPI.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Literal

import httpx

from elasticrec.data.files import InputFile, TextFormat, find_files
from elasticrec.data.metadata import CategoryFlags, CategoryText, ItemMap
from elasticrec.data.progress import bar
from elasticrec.data.schema import ColumnMap
from elasticrec.data.sequences import Replaceable, replacing_folder
from elasticrec.errors import ConfigError, FetchError, suggestion

Say = Callable[[str], object]
RECORD = "fetched.json"  # sha256 of each unpacked file, written once the download was checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Checksum:
    """What a file must hash to."""

    algorithm: Literal["sha256", "md5"]
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How to read a data set: names are those inside the mirror's archive."""

    interactions: str
    interactions_format: TextFormat
    columns: ColumnMap
    items: str
    items_format: TextFormat
    item_map: ItemMap
    others: tuple[str, ...] = ()  # unpacked too: licence, users

    @property
    def members(self) -> tuple[str, ...]:
        return (self.interactions, self.items, *self.others)


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpZip:
    """A zip archive on a web server."""

    name: str
    url: str
    checksum: Checksum
    layout: Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """Files inside a wheel on PyPI: reachable behind a package proxy where nothing else is."""

    name: str
    requirement: str
    checksums: tuple[tuple[str, Checksum], ...]  # of each file that is unpacked
    layout: Layout


Mirror = HttpZip | Wheel


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A data set and where to get it, best place first."""

    name: str
    licence: str
    mirrors: tuple[Mirror, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a mirror may take to answer, and to send the next bytes once it has."""

    connect_s: float = 4.0
    answer_s: float = 8.0
    stall_s: float = 30.0
    pip_s: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RawDataset:
    """Files as they came, with how to read them. `name`: data set and mirror, None for a user's own log."""

    interactions: tuple[InputFile, ...]
    columns: ColumnMap
    items: tuple[InputFile, ...]
    item_map: ItemMap
    name: str | None = None


class MirrorError(Exception):
    """Why one mirror is passed over."""


def fetch(
    name: str,
    cache: Path | None = None,
    say: Say = print,
    *,
    patience: Patience | None = None,
    catalogue: dict[str, Dataset] | None = None,
) -> RawDataset:
    """The files of a data set, from the cache where they are and unharmed, else from the first mirror that delivers.

    Args:
        cache: a folder; $ELASTICREC_CACHE or ~/.cache/elasticrec when not given.
        say: takes the licence and a line for each mirror that is passed over.

    Raises:
        ConfigError: the catalogue has no such data set.
        FetchError: no mirror delivered the expected files.
    """
    known = CATALOGUE if catalogue is None else catalogue
    if name not in known:
        raise ConfigError(f"no data set '{name}' in the catalogue{suggestion(name, known)}")
    dataset, root = known[name], cache or cache_folder()
    say(dataset.licence)
    for mirror in dataset.mirrors:
        if _is_cached(root / name / mirror.name, mirror, say):
            return _described(dataset, mirror, root)
    reasons = []
    for mirror in dataset.mirrors:
        try:
            with replacing_folder(root / name / mirror.name, _download_of(mirror)) as partial:
                download(mirror, partial, root, say, patience or Patience())
                _record(partial)
            return _described(dataset, mirror, root)
        except MirrorError as error:
            say(f"{name}: mirror '{mirror.name}' passed over: {error}")
            reasons.append(f"{mirror.name}: {error}")
    raise FetchError(f"no mirror delivered '{name}' ({'; '.join(reasons)}). {_by_hand(dataset, root)}")


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("ELASTICREC_CACHE") or "~/.cache/elasticrec").expanduser()


@singledispatch
def download(mirror: object, folder: Path, cache: Path, say: Say, patience: Patience) -> None:  # noqa: ARG001
    """Puts the mirror's checked files into `folder`, which the caller renames or removes.

    Raises:
        MirrorError: it does not answer, or sends something else.
    """
    raise AssertionError(f"no download for {type(mirror).__name__}")


@download.register
def _(mirror: HttpZip, folder: Path, cache: Path, say: Say, patience: Patience) -> None:
    archive = folder / "download.zip"
    by_hand = cache / Path(urllib.parse.urlsplit(mirror.url).path).name
    if by_hand.exists():
        say(f"using '{by_hand}'")
        shutil.copyfile(by_hand, archive)
    else:
        _get(mirror.url, archive, patience)
    _check(archive, mirror.checksum, by_hand.name)
    _unpack(archive, folder, mirror.layout.members)
    archive.unlink()


@download.register
def _(mirror: Wheel, folder: Path, cache: Path, say: Say, patience: Patience) -> None:  # noqa: ARG001
    if importlib.util.find_spec("pip") is None:
        raise MirrorError(f"'{sys.executable}' has no pip to download {mirror.requirement} with")
    with tempfile.TemporaryDirectory(dir=folder) as wheels, _waiting(f"pip download {mirror.requirement}"):
        _pip_download(mirror.requirement, wheels, patience)
        wheel = next(Path(wheels).glob("*.whl"))
        _unpack(wheel, folder, mirror.layout.members)
    for member, checksum in mirror.checksums:
        _check(folder / Path(member).name, checksum, member)


def _pip_download(requirement: str, into: str, patience: Patience) -> None:
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", "--dest", into]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", str(patience.answer_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience.pip_s, check=False)
    except subprocess.TimeoutExpired:
        raise MirrorError(f"pip did not finish within {patience.pip_s:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise MirrorError(f"pip download {requirement} failed: {lines[-1] if lines else f'status {done.returncode}'}")


def _get(url: str, archive: Path, patience: Patience) -> None:
    _resolve(url, patience.connect_s)
    timeout = httpx.Timeout(patience.stall_s, connect=patience.connect_s, read=patience.answer_s)
    try:
        with httpx.stream("GET", url, timeout=timeout, follow_redirects=True) as answer, bar(bytes_=True) as progress:
            answer.raise_for_status()
            size = answer.headers.get("content-length")
            task = progress.add_task(archive.parent.parent.name, total=int(size) if size else None)
            with archive.open("wb") as file:
                for block in answer.iter_bytes(1 << 20):
                    file.write(block)
                    progress.advance(task, len(block))
    except httpx.HTTPError as error:
        raise MirrorError(f"{url} does not answer ({type(error).__name__}: {error})") from None


def _resolve(url: str, limit_s: float) -> None:
    """Asks for the host's address with a limit: the resolver itself may hang far longer than a connect time-out."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies() or parts.hostname is None:
        return
    failed: list[OSError] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(parts.hostname, parts.port or 443)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive() or failed:
        reason = failed[0].strerror if failed else f"no answer within {limit_s:g} s"
        raise MirrorError(f"the address of {parts.hostname} is not to be had ({reason})")


def _check(path: Path, checksum: Checksum, shown: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, checksum.algorithm).hexdigest()
    if found != checksum.digest:
        raise MirrorError(f"{shown} has {checksum.algorithm} {found}, expected {checksum.digest}")


def _unpack(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Those members and nothing else, under their bare names."""
    try:
        with zipfile.ZipFile(archive) as source:
            for member in members:
                with source.open(member) as packed, (folder / Path(member).name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise MirrorError(f"{archive.name} is not the expected archive ({error})") from None


@contextlib.contextmanager
def _waiting(doing: str) -> Iterator[None]:
    with bar() as progress:
        progress.add_task(doing, total=None)
        yield


def _record(folder: Path) -> None:
    (folder / RECORD).write_text(json.dumps(_digests(folder), indent=2) + "\n", encoding="utf-8")


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != RECORD:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _download_of(mirror: Mirror) -> Replaceable:
    """A damaged download may be replaced, whatever is missing of it; not what a user put into the cache."""
    names = {RECORD, *(Path(member).name for member in mirror.layout.members)}
    return Replaceable("download", lambda folder: {entry.name for entry in folder.iterdir()} <= names)


def _is_cached(folder: Path, mirror: Mirror, say: Say) -> bool:
    if not folder.exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        complete = {Path(member).name for member in mirror.layout.members} <= set(recorded)
        if complete and recorded == _digests(folder):
            return True
    say(f"'{folder}' is damaged; fetching it again")
    return False


def _described(dataset: Dataset, mirror: Mirror, cache: Path) -> RawDataset:
    folder, layout = cache / dataset.name / mirror.name, mirror.layout
    return RawDataset(
        name=f"{dataset.name} from {mirror.name}",
        interactions=tuple(find_files([folder / Path(layout.interactions).name], layout.interactions_format)),
        columns=layout.columns,
        items=tuple(find_files([folder / Path(layout.items).name], layout.items_format)),
        item_map=layout.item_map,
    )


def _by_hand(dataset: Dataset, cache: Path) -> str:
    urls = [mirror.url for mirror in dataset.mirrors if isinstance(mirror, HttpZip)]
    return f"Download {urls[0]} elsewhere, put it into '{cache}' and run this again" if urls else "Try again later"


_BASE = "https://files.grouplens.org/datasets/movielens/"
_LICENCE = """\
{title}, collected by GroupLens Research at the University of Minnesota. It may be used for research under their usage
licence: acknowledge it in publications, do not redistribute it without their permission, no commercial use without
their permission, no claim that the University or GroupLens endorses the result. No warranty. Full text:
{readme}
Cite: F. M. Harper and J. A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on Interactive
Intelligent Systems 5, 4, 19:1-19:19. https://doi.org/10.1145/2827872"""

_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_RATED = ColumnMap(user="user", item="movie", rating="rating", time="time")
_RATED_HEADER = ("user", "movie", "rating", "time")

ML_100K_ZIP = Layout(
    interactions="ml-100k/u.data",
    interactions_format=TextFormat(separator="\t", quoted=False, header=_RATED_HEADER),
    columns=_RATED,
    items="ml-100k/u.item",
    items_format=TextFormat(
        separator="|",
        quoted=False,
        encoding="latin-1",
        header=("movie", "title", "date", "video", "url", *_GENRES_100K),
    ),
    item_map=ItemMap(key="movie", title="title", categories=CategoryFlags(columns=_GENRES_100K)),
    others=("ml-100k/u.user", "ml-100k/README"),
)
_RECBOLE = "recbole/dataset_example/ml-100k/ml-100k"
ML_100K_RECBOLE = Layout(
    interactions=f"{_RECBOLE}.inter",
    interactions_format=TextFormat(separator="\t", quoted=False),
    columns=ColumnMap(user="user_id:token", item="item_id:token", rating="rating:float", time="timestamp:float"),
    items=f"{_RECBOLE}.item",
    items_format=TextFormat(separator="\t", quoted=False),
    item_map=ItemMap(
        key="item_id:token",
        title="movie_title:token_seq",
        year="release_year:token",
        categories=CategoryText(column="class:token_seq", separator=" "),
        corrections=(("unkonwn (unkonwn)", "unknown"),),
    ),
    others=(f"{_RECBOLE}.user",),
)
ML_1M = Layout(
    interactions="ml-1m/ratings.dat",
    interactions_format=TextFormat(separator="::", quoted=False, header=_RATED_HEADER),
    columns=_RATED,
    items="ml-1m/movies.dat",
    items_format=TextFormat(separator="::", quoted=False, encoding="latin-1", header=("movie", "title", "genres")),
    item_map=ItemMap(key="movie", title="title", categories=CategoryText(column="genres")),
    others=("ml-1m/users.dat", "ml-1m/README"),
)


def movielens_csv(folder: str) -> Layout:
    """The layout of the sets from 20M on."""
    return Layout(
        interactions=f"{folder}/ratings.csv",
        interactions_format=TextFormat(),
        columns=ColumnMap(user="userId", item="movieId", rating="rating", time="timestamp"),
        items=f"{folder}/movies.csv",
        items_format=TextFormat(),
        item_map=ItemMap(key="movieId", title="title", categories=CategoryText(column="genres")),
        others=(f"{folder}/README.txt",),
    )


def _movielens(name: str, title: str, readme: str, checksum: Checksum, layout: Layout, *others: Mirror) -> Dataset:
    zipped = HttpZip(name="grouplens", url=f"{_BASE}{name}.zip", checksum=checksum, layout=layout)
    return Dataset(name=name, licence=_LICENCE.format(title=title, readme=_BASE + readme), mirrors=(zipped, *others))


def _sha256(digest: str) -> Checksum:
    return Checksum(algorithm="sha256", digest=digest)


RECBOLE = Wheel(
    name="pypi-recbole",
    requirement="recbole==1.2.1",
    checksums=(
        (f"{_RECBOLE}.inter", _sha256("4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff")),
        (f"{_RECBOLE}.item", _sha256("51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532")),
        (f"{_RECBOLE}.user", _sha256("4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972")),
    ),
    layout=ML_100K_RECBOLE,
)

CATALOGUE: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        _movielens(
            "ml-100k", "MovieLens 100K", "ml-100k-README.txt",
            _sha256("50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229"), ML_100K_ZIP, RECBOLE,
        ),
        _movielens(
            "ml-1m", "MovieLens 1M", "ml-1m-README.txt",
            _sha256("a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20"), ML_1M,
        ),
        _movielens(
            "ml-20m", "MovieLens 20M", "ml-20m-README.html",
            _sha256("96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3"), movielens_csv("ml-20m"),
        ),
        _movielens(
            "ml-32m", "MovieLens 32M", "ml-32m-README.html",
            Checksum(algorithm="md5", digest="d472be332d4daa821edc399621853b57"), movielens_csv("ml-32m"),
        ),
    )
}  # fmt: skip
