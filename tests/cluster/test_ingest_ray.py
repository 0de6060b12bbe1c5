"""What Ray Data makes of a log is, byte for byte, what one process makes of it."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray

from elasticrec.data import prepare as prepare_module
from elasticrec.data.prepare import PrepareConfig, prepare
from elasticrec.data.synthetic import SyntheticConfig, generate
from elasticrec.errors import InputError

# Ray warns of its own defaults, and leaves sockets to the collector when it stops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="er-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()
    if before is None:
        del os.environ["RAY_AUTH_MODE"]
    else:
        os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One log twice: as three csv files, one with no rows, and as parquet of several row groups."""
    folder = tmp_path_factory.mktemp("log")
    events = generate(SyntheticConfig(users=120, items=60, seed=4, days=0.01, session_gap_s=0.5))  # many ties in time
    events = events.append_column("rating", pa.array([n % 5 / 2 for n in range(events.num_rows)]))
    half = events.num_rows // 2
    for name, part in (("a", events.slice(0, half)), ("b", events.slice(0, 0)), ("c", events.slice(half))):
        pacsv.write_csv(part, folder / f"{name}.csv")
    pq.write_table(events, folder / "whole.parquet", row_group_size=700)
    return folder


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("*.csv", {"time": "timestamp", "event": "event_type", "rating": "rating"}),
        ("*.parquet", {"time": "timestamp", "min_user_events": 12, "min_item_events": 25}),
        ("*.parquet", {}),
    ],
)
def test_both_roads_give_the_same_store(
    cluster: None, log: Path, tmp_path: Path, source: str, options: dict[str, object]
) -> None:
    stores = {}
    for engine in ("local", "ray"):
        config = PrepareConfig(interactions=(str(log / source),), out=tmp_path / engine, engine=engine, **options)  # type: ignore[arg-type]
        stores[engine] = prepare(config, say=[].append, command="test")
    assert stores["ray"].manifest == stores["local"].manifest
    assert stores["ray"].n_events > 500
    if "min_user_events" in options:
        assert stores["ray"].manifest["notes"]["events_dropped"] > 0
    assert sorted(os.listdir(tmp_path)) == ["local", "ray"]


def test_the_first_bad_file_is_named_and_nothing_is_left(cluster: None, log: Path, tmp_path: Path) -> None:
    head = "user_id,item_id,timestamp\n"
    for name, row in (("x.csv", "1,,3"), ("y.csv", "1,2,never"), ("z.csv", "1,2,1700000000000")):
        (tmp_path / name).write_text(f"{head}1,2,3\n{row}\n" if name != "z.csv" else f"{head}{row}\n", encoding="utf-8")

    def run(*names: str) -> None:
        paths = tuple(str(log / name if name == "a.csv" else tmp_path / name) for name in names)
        config = PrepareConfig(interactions=paths, out=tmp_path / "out", time="timestamp", engine="ray")
        prepare(config, say=[].append)

    with pytest.raises(InputError, match=r"x.csv', row 2 \(line 3\), column 'item_id': is empty"):
        run("a.csv", "x.csv", "y.csv")
    with pytest.raises(InputError, match=r"times are in seconds in '.*a.csv' and in milliseconds in '.*z.csv'"):
        run("a.csv", "z.csv")
    assert sorted(os.listdir(tmp_path)) == ["x.csv", "y.csv", "z.csv"]


def test_small_input_stays_in_this_process_even_with_a_cluster(
    cluster: None, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(interactions=(str(log / "a.csv"),), out=log / "out")
    files = tuple(prepare_module.find_files(config.interactions))
    assert not prepare_module._through_ray(files, config)
    monkeypatch.setattr(prepare_module, "RAY_FROM_BYTES", 10)
    assert prepare_module._through_ray(files, config)
