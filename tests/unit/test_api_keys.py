"""API keys: hashed at rest, followed while the service runs, and never a way in when something is broken."""

import json
import stat
import threading
from pathlib import Path

import pytest

from elasticrec.errors import ConfigError
from elasticrec.serving.auth import KeyRing, create_key, key_in, read_keys, require_loopback, revoke_key


def test_a_key_is_kept_as_a_hash_only_its_owner_can_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    key = create_key(path, "shop")
    assert key.startswith("er_")
    assert len(key) > 40
    assert key not in path.read_text()
    assert key[3:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in read_keys(path)] == ["shop"]


def test_only_known_keys_have_a_name(tmp_path: Path) -> None:
    shop, app = create_key(tmp_path / "keys.json", "shop"), create_key(tmp_path / "keys.json", "app")
    ring = KeyRing(tmp_path / "keys.json")
    assert ring.name_of(shop) == "shop"
    assert ring.name_of(app) == "app"
    stored = json.loads((tmp_path / "keys.json").read_text())["keys"][0]["sha256"]
    for wrong in ("", "er_", shop[:-1], shop + "x", shop.upper(), stored, "\udcff", "é"):
        assert ring.name_of(wrong.encode("utf-8", "replace").decode()) is None


def test_keys_made_and_revoked_count_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    old = create_key(path, "old")
    ring = KeyRing(path)
    new = create_key(path, "new")
    assert ring.name_of(new) == "new"
    revoke_key(path, "old")
    assert ring.name_of(old) is None
    assert ring.name_of(new) == "new"
    revoke_key(path, "new")  # even the last one: nobody comes in any more
    assert ring.name_of(new) is None


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"keys": [{"name": "x"}]}'])
def test_a_file_that_breaks_leaves_the_keys_in_force(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys.json"
    key = create_key(path, "shop")
    ring = KeyRing(path)
    path.unlink() if content is None else path.write_text(content)
    assert ring.name_of(key) == "shop"
    assert ring.name_of("er_other") is None
    with pytest.raises(ConfigError, match="key file"):
        KeyRing(path)


def test_a_service_does_not_start_without_a_key_in_its_file(tmp_path: Path) -> None:
    create_key(tmp_path / "keys.json", "only")
    revoke_key(tmp_path / "keys.json", "only")
    with pytest.raises(ConfigError, match="has no key"):
        KeyRing(tmp_path / "keys.json")


def test_names_are_given_once(tmp_path: Path) -> None:
    create_key(tmp_path / "keys.json", "shop")
    with pytest.raises(ConfigError, match="named 'shop' already"):
        create_key(tmp_path / "keys.json", "shop")
    with pytest.raises(ConfigError, match="needs a name"):
        create_key(tmp_path / "keys.json", " ")
    with pytest.raises(ConfigError, match="did you mean 'shop'"):
        revoke_key(tmp_path / "keys.json", "shopp")
    with pytest.raises(ConfigError, match="elasticrec serve key"):
        revoke_key(tmp_path / "none.json", "shop")


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    threads = [threading.Thread(target=create_key, args=(tmp_path / "keys.json", f"user {i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.name for entry in read_keys(tmp_path / "keys.json")) == [f"user {i}" for i in range(8)]


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, None),
        ({b"authorization": b"Bearer er_a"}, "er_a"),
        ({b"authorization": b"bearer  er_a "}, "er_a"),
        ({b"authorization": b"Basic er_a"}, None),
        ({b"authorization": b"Bearer"}, None),
        ({b"x-api-key": b"er_a"}, "er_a"),
        ({b"x-api-key": b"\xff\xfe"}, "ÿþ"),
    ],
)
def test_where_a_request_carries_its_key(headers: dict[bytes, bytes], key: str | None) -> None:
    assert key_in(headers) == key


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", None])
def test_loopback_needs_no_key(host: str | None) -> None:
    require_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", ""])
def test_any_other_address_does(host: str) -> None:
    with pytest.raises(ConfigError, match="no API key is configured and Serve listens on"):
        require_loopback(host)
