"""Mirrors: passed over when silent or wrong, cached when right; both ml-100k layouts give one store."""

import csv
import dataclasses
import functools
import hashlib
import http.server
import io
import os
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elasticrec.data import sources
from elasticrec.data.prepare import prepare_dataset, prepare_raw
from elasticrec.data.sequences import verify_store
from elasticrec.data.sources import CATALOGUE, Checksum, Dataset, HttpZip, Patience, fetch
from elasticrec.errors import ConfigError, FetchError

FILMS = ("1::Ca\u00e7a (1995)::Animation", "2::unknown::unknown", "3::Two Words (1996)::Drama")
U_DATA = (
    "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"  # ml-100k/u.data, as published in many places
)
QUICK = Patience(connect_s=2.0, answer_s=1.0)
STEADY = Patience(connect_s=10.0, answer_s=30.0)  # a busy machine must not pass for a silent mirror


class _Server(http.server.ThreadingHTTPServer):
    folder: Path
    requests: list[str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[_Server]:
    """A real web server of files in a folder, which counts what it is asked for."""
    folder = tmp_path / "www"
    folder.mkdir()
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            requests.append(self.path)

    with _Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as running:
        running.folder, running.requests = folder, requests
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def zipped(folder: Path, name: str, members: dict[str, bytes]) -> Checksum:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for member, content in members.items():
            file.writestr(member, content)
    (folder / f"{name}.zip").write_bytes(archive.getvalue())
    return Checksum(algorithm="sha256", digest=hashlib.sha256(archive.getvalue()).hexdigest())


def ml_100k_members() -> dict[str, bytes]:
    """Made-up films in the layout of the GroupLens zip."""
    flags = {"Animation": "3", "Drama": "8", "unknown": "0"}
    films = [("1", "Ca\u00e7a (1995)", "Animation"), ("2", "unknown", "unknown"), ("3", "Two  Words (1996) ", "Drama")]
    item = "".join(
        f"{key}|{title}|01-Jan-1995||http://x|"
        + "|".join("1" if str(n) == flags[genre] else "0" for n in range(19))
        + "\n"
        for key, title, genre in films
    )
    data = "7\t3\t4\t20\n7\t1\t5\t10\n9\t1\t1\t5\n7\t2\t3\t20\n"
    readme = {"ml-100k/u.user": b"7|24|M|writer|85711\n", "ml-100k/README": b"", "ml-100k/allbut.pl": b"exit"}
    return {"ml-100k/u.data": data.encode(), "ml-100k/u.item": item.encode("latin-1"), **readme}


def catalogue(url: str, checksum: Checksum, layout: sources.Layout = sources.ML_100K_ZIP) -> dict[str, Dataset]:
    mirror = HttpZip(name="web", url=url, checksum=checksum, layout=layout)
    return {"films": Dataset(name="films", licence="be kind", mirrors=(mirror,))}


def address(server: _Server, name: str = "films.zip") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def test_a_zip_is_fetched_checked_unpacked_and_then_taken_from_the_cache(server: _Server, tmp_path: Path) -> None:
    known = catalogue(address(server), zipped(server.folder, "films", ml_100k_members()))
    said: list[str] = []
    for _ in range(2):
        raw = fetch("films", tmp_path / "cache", said.append, patience=STEADY, catalogue=known)
    assert raw.name == "films from web"
    assert server.requests == ["/films.zip"]
    assert said == ["be kind", "be kind"]
    assert sorted(os.listdir(tmp_path / "cache" / "films")) == ["web"]
    assert sorted(os.listdir(tmp_path / "cache" / "films" / "web")) == [
        "README",
        "fetched.json",
        "u.data",
        "u.item",
        "u.user",
    ]


def test_a_damaged_cache_is_fetched_again(server: _Server, tmp_path: Path) -> None:
    known = catalogue(address(server), zipped(server.folder, "films", ml_100k_members()))
    said: list[str] = []
    fetch("films", tmp_path / "cache", said.append, patience=STEADY, catalogue=known)
    (tmp_path / "cache" / "films" / "web" / "u.data").write_text("1\t1\t1\t1\n")
    fetch("films", tmp_path / "cache", said.append, patience=STEADY, catalogue=known)
    assert len(server.requests) == 2
    assert any("is damaged; fetching it again" in line for line in said)
    assert (tmp_path / "cache" / "films" / "web" / "u.data").read_bytes() == ml_100k_members()["ml-100k/u.data"]


def _wrong_checksum(server: _Server) -> dict[str, Dataset]:
    zipped(server.folder, "films", ml_100k_members())
    return catalogue(address(server), Checksum(algorithm="md5", digest="0" * 32))


def _not_there(server: _Server) -> dict[str, Dataset]:
    return catalogue(address(server, "gone.zip"), Checksum(algorithm="md5", digest="0" * 32))


def _other_content(server: _Server) -> dict[str, Dataset]:
    return catalogue(address(server), zipped(server.folder, "films", {"ml-100k/u.data": b"1\t1\t1\t1\n"}))


def _no_such_host(_: _Server) -> dict[str, Dataset]:
    return catalogue("https://films.invalid/films.zip", Checksum(algorithm="md5", digest="0" * 32))


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (_wrong_checksum, "films.zip has md5 "),
        (_not_there, "404"),
        (_other_content, "is not the expected archive"),
        (_no_such_host, "films.invalid"),
    ],
)
def test_a_wrong_mirror_is_passed_over_and_leaves_nothing(
    server: _Server, tmp_path: Path, known: Callable[[_Server], dict[str, Dataset]], reason: str
) -> None:
    said: list[str] = []
    with pytest.raises(FetchError, match="no mirror delivered 'films'"):
        fetch("films", tmp_path / "cache", said.append, patience=STEADY, catalogue=known(server))
    assert "films: mirror 'web' passed over: " in said[-1]
    assert reason in said[-1]
    assert os.listdir(tmp_path / "cache" / "films") == []


def test_a_mirror_that_accepts_and_stays_silent_is_passed_over_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        known = catalogue(f"http://127.0.0.1:{silent.getsockname()[1]}/x.zip", Checksum(algorithm="md5", digest=""))
        said: list[str] = []
        begin = time.monotonic()
        with pytest.raises(FetchError):
            fetch("films", tmp_path, said.append, patience=QUICK, catalogue=known)
    assert time.monotonic() - begin < 5
    assert "does not answer (ReadTimeout" in said[-1]


def test_an_archive_put_into_the_cache_by_hand_is_used(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    checksum = zipped(tmp_path / "cache", "films", ml_100k_members())
    raw = fetch("films", tmp_path / "cache", [].append, catalogue=catalogue("http://films.invalid/films.zip", checksum))
    assert raw.interactions[0].bytes > 0


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no data set 'ml100k' in the catalogue; did you mean 'ml-100k'"):
        fetch("ml100k")


def test_every_set_of_the_catalogue_is_checked_and_has_a_licence() -> None:
    assert list(CATALOGUE) == ["ml-100k", "ml-1m", "ml-20m", "ml-32m"]
    lengths = {"sha256": 64, "md5": 32}
    for dataset in CATALOGUE.values():
        assert "Harper" in dataset.licence
        zips = [mirror for mirror in dataset.mirrors if isinstance(mirror, HttpZip)]
        assert [len(mirror.checksum.digest) for mirror in zips] == [
            lengths[mirror.checksum.algorithm] for mirror in zips
        ]


def items_of(known: dict[str, Dataset], tmp_path: Path, cache: Path) -> list[dict[str, object]]:
    store = prepare_raw(
        fetch("films", cache, [].append, patience=STEADY, catalogue=known), tmp_path / "store", command="test"
    )
    verify_store(store.path)
    return store.items().to_pylist()


def test_the_layouts_of_grouplens_are_read(server: _Server, tmp_path: Path) -> None:
    small = catalogue(address(server), zipped(server.folder, "films", ml_100k_members()))
    items = items_of(small, tmp_path, tmp_path / "a")
    assert [(item["item_id"], item["title"], item["categories"], item["count"]) for item in items] == [
        ("1", "Ca\u00e7a (1995)", ["Animation"], 2),
        ("3", "Two Words (1996)", ["Drama"], 1),
        ("2", "unknown", ["unknown"], 1),
    ]
    one_m = {
        "ml-1m/ratings.dat": b"7::3::4::20\n7::1::5::10\n9::1::1::5\n7::2::3::20\n",
        "ml-1m/movies.dat": "1::Ca\u00e7a (1995)::Animation\n2::unknown::unknown\n3::Two Words (1996)::Drama\n".encode(
            "latin-1"
        ),
        "ml-1m/users.dat": b"",
        "ml-1m/README": b"",
    }
    known = catalogue(address(server, "one.zip"), zipped(server.folder, "one", one_m), sources.ML_1M)
    assert items_of(known, tmp_path, tmp_path / "b") == items
    csvs = {
        "x/ratings.csv": b"userId,movieId,rating,timestamp\n7,3,4.0,20\n7,1,5.0,10\n9,1,1.0,5\n7,2,3.0,20\n",
        "x/movies.csv": "\n".join(["movieId,title,genres", *(line.replace("::", ",") for line in FILMS), ""]).encode(),
        "x/README.txt": b"",
    }
    known = catalogue(address(server, "csv.zip"), zipped(server.folder, "csv", csvs), sources.movielens_csv("x"))
    assert items_of(known, tmp_path, tmp_path / "c") == items


def test_ml_100k_through_the_package_index_and_the_same_store_from_the_grouplens_layout(tmp_path: Path) -> None:
    """The real data set by pip; its GroupLens form is written here from it, since that server may be out of reach."""
    said: list[str] = []
    dataset = dataclasses.replace(CATALOGUE["ml-100k"], mirrors=(sources.RECBOLE,))
    raw = fetch("ml-100k", None, said.append, catalogue={"ml-100k": dataset})
    assert "GroupLens" in said[0]
    folder = Path(raw.interactions[0].path).parent
    assert sorted(os.listdir(folder)) == ["fetched.json", "ml-100k.inter", "ml-100k.item", "ml-100k.user"]
    events = (folder / "ml-100k.inter").read_bytes().split(b"\n", 1)[1]
    assert hashlib.sha256(events).hexdigest() == U_DATA  # so both mirrors hold the same events in the same order
    wheel = prepare_raw(raw, tmp_path / "wheel", command="test")
    assert (wheel.n_users, wheel.n_items, wheel.n_events) == (943, 1682, 100_000)
    assert wheel.items()["title"].to_pylist()[:2] == ["Star Wars (1977)", "Contact (1997)"]
    assert wheel.items()["categories"].to_pylist()[1] == ["Drama", "Sci-Fi"]
    assert wheel.manifest["notes"]["ties"] == 50_561

    cache = tmp_path / "cache"
    cache.mkdir()
    checksum = zipped(cache, "films", _as_grouplens(folder))
    known = catalogue("http://films.invalid/films.zip", checksum)
    zipped_store = prepare_raw(fetch("films", cache, said.append, catalogue=known), tmp_path / "zip", command="test")
    assert zipped_store.manifest["files"] == wheel.manifest["files"]


def _as_grouplens(folder: Path) -> dict[str, bytes]:
    genres = sources.ML_100K_ZIP.items_format.header
    assert genres is not None
    lines = []
    with (folder / "ml-100k.item").open(encoding="utf-8", newline="") as file:
        for key, title, year, kinds in list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]:
            flags = "|".join("1" if genre in kinds.split(" ") else "0" for genre in genres[5:])
            named = "unknown" if key == "267" else f"{title} ({year})"
            lines.append(f"{key}|{named}|01-Jan-{year}||http://us.imdb.com|{flags}\n")
    data = (folder / "ml-100k.inter").read_bytes().split(b"\n", 1)[1]
    item = "".join(lines).encode("latin-1")
    return {"ml-100k/u.data": data, "ml-100k/u.item": item, "ml-100k/u.user": b"", "ml-100k/README": b""}


def test_prepare_dataset_refuses_a_foreign_folder_before_it_fetches(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="is no prepared data set"):
        prepare_dataset("ml-100k", tmp_path)
