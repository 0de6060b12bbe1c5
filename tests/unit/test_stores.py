"""Where events and items lie: a path is an SQLite file, some schemes are Redis, no other address is a file."""

from pathlib import Path

import pytest

from elasticrec.errors import ConfigError
from elasticrec.serving.stores import absolute, is_shared, open_events, open_items

SECRET = "sesame"


@pytest.mark.parametrize(
    "where",
    [
        f"redis+tls://user:{SECRET}@redis.example.org:6379/0",
        "foo://x",
        "sqlite:///x",
        "file:///x",
        "redis:/h",
        "http://[::1",
    ],
)
def test_another_address_is_no_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for opened in (absolute, open_events, open_items, is_shared):
        with pytest.raises(ConfigError, match=r"give redis://, rediss:// \(TLS\) or unix:// .* SQLite file") as told:
            opened(where)
        assert SECRET not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_an_address_stays_and_a_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for where in ("redis://h:6379/0", "rediss://h?wait_replicas=1", "unix:///run/redis.sock"):
        assert is_shared(where)
        assert absolute(where) == where
    for where in ("events.sqlite", "runs/a:b.sqlite"):
        assert not is_shared(where)
        assert absolute(where) == str(tmp_path / where)
    assert absolute(str(tmp_path / "e")) == str(tmp_path / "e")
