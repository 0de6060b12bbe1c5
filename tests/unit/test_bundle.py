"""Bundles: what is written comes back in another process, every kind of damage is named, nothing half-written stays."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from elasticrec.artifact.bundle import Bundle, open_bundle, verify_bundle, write_bundle
from elasticrec.artifact.location import locate
from elasticrec.errors import BundleError, ConfigError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.history import History
from elasticrec.model.network import Network, NetworkConfig

N_ITEMS = 20
FILES = ("weights.safetensors", "items.parquet", "manifest.json")


def _network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=6)), N_ITEMS).eval()


def _items(rows: int = N_ITEMS) -> pa.Table:
    return pa.table(
        {
            "item_index": pa.array(range(1, rows + 1), pa.int32()),
            "item_id": [f"id-{i}" for i in range(rows)],
            "title": [f"Film {i}" for i in range(rows)],
            "categories": [["a", "b"]] * rows,
            "count": pa.array(range(rows, 0, -1), pa.int64()),
        }
    )


def _write(place: str | Path) -> Bundle:
    return write_bundle(
        place,
        _network(),
        _items(),
        name="films",
        version="7",
        recipe={"kind": "int8_table"},
        metrics={"ndcg@10": np.float32(0.5), "steps": np.int64(3)},
        lineage={"parent": "/there", "dataset": "abc", "command": "elasticrec train"},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return _write(tmp_path / "bundle")


HISTORY_BT = torch.tensor([[0, 0, 3, 4, 5, 6], [1, 2, 3, 4, 5, 20]])

READ_ELSEWHERE = """
import sys, torch
from elasticrec.artifact.bundle import open_bundle
from elasticrec.model.history import History
bundle = open_bundle(sys.argv[1])
network = bundle.network()
assert not network.training and not any(p.requires_grad for p in network.parameters())
history_BT = torch.tensor([[0, 0, 3, 4, 5, 6], [1, 2, 3, 4, 5, 20]])
torch.save(network.scores(History(history_BT)), sys.argv[2])
"""


def test_network_scores_the_same_in_a_fresh_process(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "scores.pt"
    subprocess.run([sys.executable, "-c", READ_ELSEWHERE, bundle.uri, str(out)], check=True, timeout=120)
    assert torch.equal(torch.load(out), _network().scores(History(HISTORY_BT)))


def test_manifest_says_what_it_is_and_where_it_came_from(bundle: Bundle) -> None:
    manifest = open_bundle(bundle.uri).manifest
    assert (manifest.name, manifest.version, manifest.n_items) == ("films", "7", N_ITEMS)
    assert manifest.recipe == {"kind": "int8_table"}
    assert manifest.metrics == {"ndcg@10": 0.5, "steps": 3}
    assert manifest.lineage["parent"] == "/there"
    assert manifest.lineage["dataset"] == "abc"
    assert manifest.lineage["command"] == "elasticrec train"
    assert set(manifest.lineage["versions"]) == {"elasticrec", "torch", "ray", "python"}
    assert open_bundle(bundle.uri).items().equals(_items())


def test_sizes_are_those_on_the_disk(bundle: Bundle) -> None:
    size = {path.name: path.stat().st_size for path in Path(bundle.uri).iterdir()}
    assert sorted(size) == sorted(FILES)
    assert bundle.bytes == sum(size.values())
    assert bundle.weights_bytes == size["weights.safetensors"]


def test_recipe_may_be_a_word(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", _network(), _items(), name="films", version="1", recipe="bfloat16_table")
    assert bundle.manifest.recipe == {"kind": "bfloat16_table"}


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _write("here/bundle").uri == str(tmp_path / "here" / "bundle")
    verify_bundle(f"file://{tmp_path}/here/bundle")


def test_a_bundle_is_never_overwritten(bundle: Bundle) -> None:
    before = Path(bundle.uri, "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="never overwritten"):
        _write(bundle.uri)
    assert Path(bundle.uri, "manifest.json").read_bytes() == before
    assert [path.name for path in Path(bundle.uri).parent.iterdir()] == ["bundle"]


def test_any_folder_in_the_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(BundleError, match="never overwritten"):
        _write(tmp_path / "b")


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_anywhere_is_found_and_named(bundle: Bundle, name: str) -> None:
    path = Path(bundle.uri, name)
    good = path.read_bytes()
    for position in np.linspace(0, len(good) - 2, 40).astype(int):  # the very last byte of the JSON is a line end
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(BundleError, match=name):
            verify_bundle(bundle.uri)
    path.write_bytes(good)
    verify_bundle(bundle.uri)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_cut_off_file_is_named(bundle: Bundle, name: str, keep: float) -> None:
    path = Path(bundle.uri, name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle.uri)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    Path(bundle.uri, name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle.uri)


def test_an_extra_file_is_named(bundle: Bundle) -> None:
    Path(bundle.uri, "notes.txt").write_text("hello")
    with pytest.raises(BundleError, match=r"notes\.txt.*remove it"):
        verify_bundle(bundle.uri)


def test_damage_that_was_not_looked_for_is_named_when_it_is_read(bundle: Bundle) -> None:
    for name in FILES[:2]:
        Path(bundle.uri, name).write_bytes(b"\0" * 100)
    opened = open_bundle(bundle.uri, verify=False)
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        opened.network()
    with pytest.raises(BundleError, match=r"items\.parquet"):
        opened.items()


def _rewrite(bundle: Bundle, **changes: object) -> None:
    """Changes the manifest as a writer would, its digest included."""
    path = Path(bundle.uri, "manifest.json")
    content = json.loads(path.read_text()) | changes
    content.pop("digest")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(content | {"digest": digest}))


def test_a_newer_schema_names_the_version_that_reads_it(bundle: Bundle) -> None:
    _rewrite(bundle, schema_version=2, readable_since="3.1.0", files="another shape")
    with pytest.raises(BundleError, match=r"schema 2, .* reads up to 1; install elasticrec>=3\.1\.0"):
        open_bundle(bundle.uri)


def test_a_file_outside_the_folder_is_refused(bundle: Bundle) -> None:
    files = json.loads(Path(bundle.uri, "manifest.json").read_text())["files"]
    _rewrite(bundle, files=files | {"../../secret": {"bytes": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match=r"\.\./\.\./secret.*not a plain file name"):
        open_bundle(bundle.uri)


def test_config_that_does_not_fit_the_weights_is_an_error(bundle: Bundle) -> None:
    _rewrite(bundle, n_items=N_ITEMS + 1)
    with pytest.raises(BundleError, match="no network this version can build"):
        open_bundle(bundle.uri).network()


def test_a_folder_without_a_bundle_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a bundle: it has no manifest\.json"):
        open_bundle(tmp_path)


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(ConfigError, match="foo://x/y"):
        open_bundle("foo://x/y")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (_items().drop_columns(["title"]), "no column 'title'"),
        (_items(rows=3), "3 rows, the network 20 items"),
        (_items().take(list(reversed(range(N_ITEMS)))), "sort it by item_index"),
    ],
)
def test_items_that_do_not_fit_leave_nothing_behind(tmp_path: Path, items: pa.Table, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "b", _network(), items, name="films", version="1")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    network = _network()
    with torch.no_grad():
        network.encoder.position_TD[0, 0] = float("nan")
    with pytest.raises(BundleError, match=r"position_TD' holds NaN"):
        write_bundle(tmp_path / "b", network, _items(), name="films", version="1")


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_metrics_that_json_cannot_keep_leave_nothing_behind(tmp_path: Path, value: object) -> None:
    with pytest.raises(BundleError, match=r"metrics\.loss"):
        write_bundle(tmp_path / "b", _network(), _items(), name="films", version="1", metrics={"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        _write(tmp_path / "file" / "bundle")


def test_bundles_live_on_other_filesystems(tmp_path: Path) -> None:
    uri = f"fsspec+memory://{tmp_path}/bundle"
    bundle = _write(uri)
    assert bundle.uri == uri
    verify_bundle(uri)
    assert torch.equal(open_bundle(uri).network().scores(History(HISTORY_BT)), _network().scores(History(HISTORY_BT)))
    assert open_bundle(uri).items().equals(_items())
    with pytest.raises(BundleError, match="never overwritten"):
        _write(uri)
    (bundle.location / "weights.safetensors").write(b"other")
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        open_bundle(uri)


def test_a_failed_write_elsewhere_is_no_bundle(tmp_path: Path) -> None:
    uri = f"fsspec+memory://{tmp_path}/bundle"
    with pytest.raises(BundleError, match=r"metrics\.loss"):
        write_bundle(uri, _network(), _items(), name="films", version="1", metrics={"loss": float("inf")})
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(uri)
    verify_bundle(_write(uri).uri)


def test_a_failed_write_elsewhere_removes_nothing_that_was_there(tmp_path: Path) -> None:
    models = locate(f"fsspec+memory://{tmp_path}/models")
    _write(models / "a")
    (models / "notes").write(b"mine")
    for place in (models, models / "notes"):
        with pytest.raises(BundleError, match=r"metrics\.loss|is there already"):
            write_bundle(place, _network(), _items(), name="films", version="1", metrics={"loss": float("nan")})
    assert models.children() == ["a", "notes"]
    assert (models / "notes").read() == b"mine"
    verify_bundle(models / "a")


def test_what_a_killed_writer_left_elsewhere_is_not_taken_into_a_bundle(tmp_path: Path) -> None:
    place = locate(f"fsspec+memory://{tmp_path}/bundle")
    place.make_folder()
    (place / "content.parquet").write(b"half")
    with pytest.raises(BundleError, match=r"bundle' is there already"):
        _write(place)
    assert place.children() == ["content.parquet"]


WRITE_FOR_EVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_bundle import _write
for number in range(10**9):
    _write(f"{sys.argv[2]}/{number}")
"""


def test_a_killed_writer_leaves_only_whole_bundles(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(Path(__file__).parent), str(tmp_path)]
    writer = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "5").exists() and time.monotonic() < deadline:
        time.sleep(0.003)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(visible) >= 6
    for path in visible:
        verify_bundle(path)
