"""Registry: versions are never replaced, labels move whole and one at a time, references find them."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.artifact.bundle import Bundle, open_bundle, verify_bundle, write_bundle
from elasticrec.artifact.registry import Move, Reference, Registry, parse_reference, resolve_reference, trail
from elasticrec.cli.registry import promote, publish, rollback
from elasticrec.errors import BundleError, ConfigError, RegistryError
from elasticrec.model.encoder import EncoderConfig
from elasticrec.model.network import Network, NetworkConfig


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    network = Network(NetworkConfig(encoder=EncoderConfig(width=8, blocks=1, max_length=4)), 3)
    columns = {"item_index": [1, 2, 3], "item_id": ["a", "b", "c"], "title": ["A", "B", "C"]}
    items = pa.table(columns | {"categories": [["x"], [], ["y"]], "count": [3, 2, 1]})
    place = tmp_path_factory.mktemp("source") / "bundle"
    return write_bundle(place, network, items, name="trained", version="0", lineage={"dataset": "abc"})


@pytest.fixture
def registry(tmp_path: Path, bundle: Bundle) -> Registry:
    """Model `films` with versions 1, 2 and 3."""
    registry = Registry(tmp_path / "registry")
    assert [registry.publish(bundle, "films") for _ in range(3)] == ["1", "2", "3"]
    return registry


def test_a_published_bundle_is_whole_and_knows_its_version(registry: Registry, bundle: Bundle) -> None:
    verify_bundle(registry.resolve("films", "2"))
    published = registry.open("films", "2")
    assert (published.name, published.version) == ("films", "2")
    assert published.manifest.lineage["dataset"] == "abc"
    assert published.manifest.lineage["published_from"] == {"uri": bundle.uri, "name": "trained", "version": "0"}
    golden = published.manifest.files["golden.json"]
    assert published.manifest.files == bundle.manifest.files | {"golden.json": golden}
    assert open_bundle(bundle.uri).version == "0"


def test_versions_sort_as_numbers(registry: Registry, bundle: Bundle) -> None:
    for _ in range(8):
        registry.publish(bundle.uri, "films")
    assert registry.versions("films") == [str(number) for number in range(1, 12)]
    assert registry.resolve("films", "latest").endswith("/films/versions/11")


def test_a_damaged_bundle_is_not_published(registry: Registry, tmp_path: Path, bundle: Bundle) -> None:
    copy = Path(registry.resolve("films", "3"))
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        registry.publish(copy, "films")
    (copy / "items.parquet").unlink()
    weights.write_bytes(Path(bundle.uri, "weights.safetensors").read_bytes())
    with pytest.raises(BundleError, match=r"items\.parquet.*missing"):
        registry.publish(copy, "films")
    assert registry.versions("films") == ["1", "2", "3"]
    assert sorted(path.name for path in copy.parent.iterdir()) == ["1", "2", "3"]


def test_labels_move_with_history(registry: Registry) -> None:
    registry.set_label("films", "production", "1", by="ann", reason="first")
    registry.set_label("films", "production", "3", by="bob", reason="better")
    registry.set_label("films", "canary", "2")
    assert registry.labels("films") == {"canary": "2", "production": "3"}
    assert registry.resolve("films") == registry.resolve("films", "3")
    moves = registry.history("films", "production")
    assert [(move.version, move.by, move.reason) for move in moves] == [("1", "ann", "first"), ("3", "bob", "better")]
    assert moves[0].at <= moves[1].at
    assert registry.history("films", "canary")[0].by != ""


def test_rollback_goes_back_step_by_step(registry: Registry) -> None:
    for version in ("1", "2", "2", "3"):
        registry.set_label("films", "production", version)
    assert registry.rollback("films", "production", reason="slow").version == "2"
    assert registry.rollback("films", "production").version == "1"
    with pytest.raises(RegistryError, match="never at another version than 1"):
        registry.rollback("films", "production")
    registry.set_label("films", "production", "3")
    assert registry.rollback("films", "production").version == "1"
    assert [move.action for move in registry.history("films", "production")] == [
        *["set"] * 4,
        *["rollback"] * 2,
        "set",
        "rollback",
    ]


@given(st.lists(st.sampled_from(["1", "2", "3", "back"])))
def test_trail_never_repeats_and_ends_where_the_label_is(steps: list[str]) -> None:
    moves: list[Move] = []
    for step in steps:
        versions = trail(moves)
        if step == "back" and len(versions) < 2:
            continue
        version, action = (versions[-2], "rollback") if step == "back" else (step, "set")
        moves.append(Move(version=version, action=action, by="", reason="", at=""))  # type: ignore[arg-type]
    versions = trail(moves)
    assert versions[-1:] == [move.version for move in moves[-1:]]
    assert all(one != other for one, other in pairwise(versions))


def test_unknown_names_say_the_nearest(registry: Registry) -> None:
    registry.set_label("films", "production", "1")
    with pytest.raises(RegistryError, match="no model 'flims'; did you mean 'films'"):
        registry.resolve("flims")
    with pytest.raises(RegistryError, match="no label 'prodution'; did you mean 'production'"):
        registry.resolve("films", "prodution")
    with pytest.raises(RegistryError, match="no version 9; known: 1, 2, 3"):
        registry.resolve("films", "9")
    with pytest.raises(RegistryError, match="no version 9"):
        registry.set_label("films", "production", "9")
    with pytest.raises(RegistryError, match="no label 'canary'"):
        registry.rollback("films", "canary")
    assert registry.labels("films") == {"production": "1"}


@pytest.mark.parametrize("label", ["7", "latest", "", "a/b", "../x", ".hidden"])
def test_labels_that_cannot_be_used(registry: Registry, label: str) -> None:
    with pytest.raises(RegistryError, match="label"):
        registry.set_label("films", label, "1")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a#b", "ä"])
def test_names_that_cannot_be_used(registry: Registry, bundle: Bundle, name: str) -> None:
    with pytest.raises(RegistryError, match="name"):
        registry.publish(bundle, name)


def test_a_damaged_label_record_is_named(registry: Registry) -> None:
    registry.set_label("films", "production", "1")
    record = Path(registry.root.path, "films", "labels", "production", "000001.json")
    record.write_text("{")
    with pytest.raises(RegistryError, match=r"000001\.json"):
        registry.resolve("films")


def test_a_missing_label_record_is_named_and_nothing_is_appended(registry: Registry) -> None:
    for version in ("1", "2", "3"):
        registry.set_label("films", "production", version)
    labels = Path(registry.root.path, "films", "labels", "production")
    (labels / "000002.json").unlink()
    for move in (
        lambda: registry.set_label("films", "production", "1"),
        lambda: registry.rollback("films", "production"),
        lambda: registry.resolve("films"),
    ):
        with pytest.raises(RegistryError, match=r"000002\.json' is missing; restore it"):
            move()
    assert sorted(path.name for path in labels.iterdir()) == ["000001.json", "000003.json"]


def test_foreign_files_do_not_disturb(registry: Registry) -> None:
    Path(registry.root.path, "README.txt").write_text("ours")
    Path(registry.root.path, "films", "labels").mkdir()
    Path(registry.root.path, "films", "labels", "README.txt").write_text("ours")
    Path(registry.root.path, "films", "versions", "README.txt").write_text("ours")
    assert registry.names() == ["films"]
    assert registry.versions("films") == ["1", "2", "3"]
    assert registry.labels("films") == {}


def test_references(registry: Registry, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry.set_label("films", "production", "2")
    root = registry.root.uri
    second = registry.resolve("films", "2")
    for text in (f"{root}#films", f"{root}#films@production", f"{root}#films@2"):
        assert resolve_reference(text) == second
    assert resolve_reference(f"{root}#films@latest") == registry.resolve("films", "3")
    monkeypatch.chdir(tmp_path)
    assert resolve_reference("registry#films") == second
    assert resolve_reference(bundle.uri) == bundle.uri
    with pytest.raises(BundleError, match="not a bundle"):
        resolve_reference(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://b/r#films@canary", Reference(root="s3://b/r", name="films", ref="canary")),
        ("r#films", Reference(root="r", name="films", ref="production")),
        ("a#b#films@1", Reference(root="a#b", name="films", ref="1")),
        ("/plain/path", None),
        ("/plain@path", None),
        ("r#", None),
        ("#films", None),
        ("r#films@", None),
        ("r#a/b", None),
    ],
)
def test_parse_reference(text: str, expected: Reference | None) -> None:
    assert parse_reference(text) == expected


def test_a_registry_on_another_filesystem(bundle: Bundle, tmp_path: Path) -> None:
    registry = Registry(f"fsspec+memory://{tmp_path}/registry")
    assert registry.publish(bundle, "films") == "1"
    assert registry.publish(registry.resolve("films", "1"), "films") == "2"
    registry.set_label("films", "production", "1")
    registry.set_label("films", "production", "2")
    assert registry.rollback("films", "production").version == "1"
    verify_bundle(resolve_reference(f"fsspec+memory://{tmp_path}/registry#films"))


def test_a_publisher_that_died_on_another_filesystem_keeps_its_number(bundle: Bundle, tmp_path: Path) -> None:
    registry = Registry(f"fsspec+memory://{tmp_path}/registry")
    dead = registry.root / "films" / "versions" / "1"
    dead.make_folder()
    (dead / "content.parquet").write(b"half")
    assert registry.publish(bundle, "films") == "2"
    assert registry.versions("films") == ["2"]
    verify_bundle(registry.resolve("films", "2"))


PUBLISH = """
import sys
from elasticrec.artifact.registry import Registry
root, bundle, who = sys.argv[1:]
registry = Registry(root)
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    version = registry.publish(bundle, "films")
    registry.set_label("films", "production", version, by=who, reason=str(number))
    print(version, flush=True)
"""


def test_many_publishers_never_share_a_version_or_lose_a_move(tmp_path: Path, bundle: Bundle) -> None:
    command = [sys.executable, "-c", PUBLISH, str(tmp_path), bundle.uri]
    writers = [
        subprocess.Popen([*command, f"w{i}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    published = [version for writer in writers for version in writer.communicate(timeout=120)[0].split()]
    assert [writer.returncode for writer in writers] == [0] * 4
    registry = Registry(tmp_path)
    assert sorted(map(int, published)) == list(range(1, 81))
    assert registry.versions("films") == [str(number) for number in range(1, 81)]
    moves = registry.history("films", "production")
    assert sorted(int(move.version) for move in moves) == list(range(1, 81))
    for who in range(4):
        own = [int(move.reason) for move in moves if move.by == f"w{who}"]
        assert own == list(range(20))
    for version in registry.versions("films"):
        verify_bundle(registry.resolve("films", version))


@pytest.mark.parametrize("label", ["canary", "shadow"])
def test_a_share_is_never_promoted_in_place_of_production(
    registry: Registry, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = registry.root.uri
    registry.set_label("films", label, "1")
    registry.set_label("films", label, "2")
    for move in (lambda: promote("films", "3", root, label), lambda: rollback("films", root, label)):
        with pytest.raises(ConfigError, match=f"move it with 'elasticrec registry {label} "):
            move()
    assert registry.labels("films") == {label: "2"}
    promote("films", "3", root)
    assert registry.labels("films")["production"] == "3"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("latest", "reads as a version"),
        ("3", "reads as a version"),
        ("a b", "cannot be used"),
        ("", "cannot be used"),
        ("canary", "move it with 'elasticrec registry canary --percent"),
        ("shadow", "move it with 'elasticrec registry shadow --percent"),
    ],
)
def test_a_label_that_cannot_be_moved_publishes_nothing(
    registry: Registry, bundle: Bundle, label: str, message: str
) -> None:
    registry.set_label("films", "canary", "2", percent=5)
    with pytest.raises((RegistryError, ConfigError), match=message):
        publish(bundle.uri, "films", registry.root.uri, label)
    assert registry.versions("films") == ["1", "2", "3"]
    assert registry.labels("films") == {"canary": "2"}
    assert [move.percent for move in registry.history("films", "canary")] == [5]


def test_a_label_that_somebody_else_moves_stays_with_them_and_the_version_is_told(
    registry: Registry, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rollback must not have to wait until a large bundle is copied, so the label alone is moved in turn."""
    with registry.moving("films", "another"), pytest.raises(RegistryError, match="another move of 'films' goes on"):
        publish(bundle.uri, "films", registry.root.uri, "production")
    assert f"{registry.root.uri}#films@4" in capsys.readouterr().out
    assert registry.labels("films") == {}


def test_publish_says_that_no_application_was_told(
    registry: Registry, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    root = registry.root.uri
    for name, label in (("films", "production"), ("songs", "staging"), ("songs", None)):
        publish(bundle.uri, name, root, label)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith((root, "'"))] == [
        f"{root}#films@4",
        "'production' is there; no application was told ('elasticrec registry promote' tells one)",
        f"{root}#songs@1",
        "'staging' is there; no application was told ('elasticrec registry promote' tells one)",
        f"{root}#songs@2",
    ]
    assert (registry.labels("films"), registry.labels("songs")) == ({"production": "4"}, {"staging": "1"})


def test_a_rollback_that_names_what_it_leaves_goes_back_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HAProxy may send a wish again whose replica died."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = registry.root.uri
    for version in ("1", "2", "3"):
        registry.set_label("films", "production", version)
    rollback("films", root, leaving="3")
    assert registry.labels("films") == {"production": "2"}
    with pytest.raises(ConfigError, match="'production' of 'films' is at version 2, not 3: somebody moved it before"):
        rollback("films", root, leaving="3")
    assert registry.labels("films") == {"production": "2"}
