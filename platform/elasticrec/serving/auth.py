"""API keys: made once and shown once, kept as SHA-256 in a JSON file, checked in constant time.

    {"keys": [{"name": "shop", "sha256": "…", "created": "2026-01-31T12:00:00+00:00", "scopes": ["read", "events"]}]}

A key is 256 random bits, so a plain hash of it cannot be searched; slow password hashes would only slow requests.
"""

import fcntl
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, get_args

from elasticrec.errors import ConfigError, suggestion

Scope = Literal["read", "events", "admin"]  # admin: erase users, change items, look inside; it includes no other
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
DEFAULT_SCOPES: Final[tuple[Scope, ...]] = ("read", "events")
KEY_PREFIX: Final = "er_"  # lets secret scanners find a leaked key
# Method and path of every route that a key without `admin` may call.
_OPENED: Final[tuple[tuple[str, re.Pattern[str], Scope], ...]] = (
    ("POST", re.compile(r"/v1/recommend(:batch)?"), "read"),
    ("GET", re.compile(r"/v1/search"), "read"),
    ("GET", re.compile(r"/v1/(items|users)/.+", re.DOTALL), "read"),
    ("POST", re.compile(r"/v1/events"), "events"),
)
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKey:
    """What is kept of a key."""

    name: str
    sha256: str
    created: str  # ISO 8601, UTC
    scopes: tuple[Scope, ...] = DEFAULT_SCOPES  # what keys could do before there were scopes

    def __post_init__(self) -> None:
        for scope in self.scopes:
            if scope not in SCOPES:
                raise ConfigError(f"key '{self.name}' has the scope '{scope}'{suggestion(str(scope), SCOPES)}")


def create_key(path: str | Path, name: str, scopes: tuple[Scope, ...] = DEFAULT_SCOPES) -> str:
    """Adds a key to the file and returns it; nothing shows it again. Running services take it up by themselves.

    Raises:
        ConfigError: the name is empty or taken, a scope is not known, or the file cannot be read.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    if not name.strip():
        raise ConfigError("an API key needs a name that says who uses it")
    with _locked(Path(path)):
        stored = read_keys(path) if Path(path).exists() else []
        if any(entry.name == name for entry in stored):
            raise ConfigError(f"'{path}' has a key named '{name}' already; choose another name or revoke that one")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        made = StoredKey(name=name, sha256=_digest(key), created=created, scopes=tuple(scopes))
        _write(Path(path), [*stored, made])
    return key


def revoke_key(path: str | Path, name: str) -> None:
    """Removes a key; running services refuse it from their next request on.

    Raises:
        ConfigError: there is no such key.
    """
    with _locked(Path(path)):
        stored = read_keys(path)
        left = [entry for entry in stored if entry.name != name]
        if len(left) == len(stored):
            raise ConfigError(f"'{path}' has no key '{name}'{suggestion(name, (entry.name for entry in stored))}")
        _write(Path(path), left)


def read_keys(path: str | Path) -> list[StoredKey]:
    """The keys of a file.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["keys"]
        return [StoredKey(**entry | {"scopes": tuple(entry.get("scopes", DEFAULT_SCOPES))}) for entry in entries]
    except FileNotFoundError:
        raise ConfigError(f"there is no key file '{path}'; make a key with 'elasticrec serve key'") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"key file '{path}' cannot be read: {error}; restore it or make new keys") from None


class KeyRing:
    """The keys of a running service. A change of the file counts from the next request on."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError when the file is missing, damaged or without a key."""
        self._path = Path(path)
        self._seen = self._state()
        self._digests = _digests(read_keys(path))
        if not self._digests:
            raise ConfigError(f"key file '{path}' has no key; make one with 'elasticrec serve key'")

    def name_of(self, key: str) -> str | None:
        """Whose key it is; none for a key that is not known."""
        found = self.find(key)
        return None if found is None else found.name

    def find(self, key: str) -> StoredKey | None:
        """What is kept of a key; none for one that is not known."""
        self._follow_file()
        given = _digest(key)
        found = None
        for digest, stored in self._digests.items():  # every one is compared: the time says nothing of which
            if hmac.compare_digest(digest, given):
                found = stored
        return found

    def _follow_file(self) -> None:
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._digests = _digests(read_keys(self._path))
        except ConfigError as error:  # a broken file must neither open the service nor end it
            _LOGGER.error("%s; the keys read before stay in force", error)

    def _state(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino, stat.st_size


def key_in(headers: Mapping[bytes, bytes]) -> str | None:
    """The key that a request brings: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    key = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    return key.decode("latin-1") or None


def scope_of(method: str, path: str) -> Scope:
    """What a request needs; whatever is not listed in `_OPENED` is administrative, so that a new route is closed."""
    return next((scope for verb, place, scope in _OPENED if verb == method and place.fullmatch(path)), "admin")


def require_loopback(host: str | None) -> None:
    """Refuses to serve without keys on an address that others reach.

    Raises:
        ConfigError: `host` is not a loopback address.
    """
    if host is not None and not _is_loopback(host):
        raise ConfigError(
            f"no API key is configured and Serve listens on {host}, where others reach it; make a key with 'elasticrec "
            "serve key' and pass keys=PATH, or start Serve with 'serve start --http-host 127.0.0.1'"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _digests(keys: list[StoredKey]) -> dict[str, StoredKey]:
    return {entry.sha256: entry for entry in keys}


def _write(path: Path, keys: list[StoredKey]) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"keys": [asdict(entry) for entry in keys]}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time; readers are not held up, since the file is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
