"""Bytes of a manifest.json in, a checked description of a bundle out, and back.

The manifest carries a digest of its own content, so that a changed number in it is found like a changed weight.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Final

from elasticrec import __version__
from elasticrec.errors import BundleError

MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.safetensors"
ITEMS: Final = "items.parquet"
CONTENT: Final = "content.parquet"  # only where a content tower was fitted
GOLDEN: Final = "golden.json"  # only once published
ENCODER: Final = "encoder.onnx"  # only once published by the command, of networks that have one

SCHEMA_VERSION: Final = 1
READABLE_SINCE: Final = "0.1.0"  # the first elasticrec that reads SCHEMA_VERSION

_DIGEST = "digest"
_TYPES: Final[dict[str, type]] = {
    "schema_version": int,
    "readable_since": str,
    "name": str,
    "version": str,
    "created": str,
    "n_items": int,
    "config": dict,
    "recipe": dict,
    "metrics": dict,
    "lineage": dict,
    "files": dict,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """What one file of a bundle must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a bundle is, where it came from and which files it consists of."""

    name: str
    version: str
    created: str  # ISO 8601, UTC
    n_items: int
    config: Mapping[str, Any]  # NetworkConfig
    recipe: Mapping[str, Any]  # how it was compressed; kind float32 when it was not
    metrics: Mapping[str, Any]
    lineage: Mapping[str, Any]  # parent, dataset, command, versions, commit
    files: Mapping[str, FileEntry]
    schema_version: int = SCHEMA_VERSION
    readable_since: str = READABLE_SINCE


def render(manifest: Manifest) -> bytes:
    """The manifest as indented JSON.

    Raises:
        BundleError: a value cannot be kept as JSON, or is not a finite number.
    """
    content = {key: _plain(value, key) for key, value in asdict(manifest).items()}
    return (json.dumps(content | {_DIGEST: _digest(content)}, indent=2) + "\n").encode()


def parse(raw: bytes, where: str) -> Manifest:
    """The manifest that `raw` holds; `where` names the file in errors.

    Raises:
        BundleError: newer than this version reads, not JSON, incomplete or changed since it was written.
    """
    content = _json(raw, where)
    _refuse_newer(content, where)
    digest = content.pop(_DIGEST, None)
    for key, expected in _TYPES.items():
        if not isinstance(content.get(key), expected):
            raise BundleError(f"'{where}' is damaged: '{key}' is not a {expected.__name__}; get the bundle again")
    if digest != _digest(content):
        raise BundleError(f"'{where}' is damaged: its content does not fit its digest; get the bundle again")
    files = {_file_name(name, where): FileEntry(**entry) for name, entry in content.pop("files").items()}
    if missing := {WEIGHTS, ITEMS} - set(files):
        raise BundleError(f"'{where}' lists no {min(missing)}; get the bundle again")
    return Manifest(files=files, **{key: content[key] for key in _TYPES if key != "files"})


def _json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"'{where}' is damaged: {error}; get the bundle again") from None
    if not isinstance(content, dict):
        raise BundleError(f"'{where}' is damaged: it holds a {type(content).__name__}, not keys and values")
    return content


def _refuse_newer(content: Mapping[str, Any], where: str) -> None:
    found = content.get("schema_version")
    if isinstance(found, int) and found > SCHEMA_VERSION:
        since = content.get("readable_since", "a newer version")
        raise BundleError(
            f"'{where}' has bundle schema {found}, elasticrec {__version__} reads up to {SCHEMA_VERSION}; "
            f"install elasticrec>={since}"
        )


def _file_name(name: str, where: str) -> str:
    """Refuses names that would lead out of the folder of the bundle."""
    if PurePath(name).name != name or name.startswith("."):
        raise BundleError(
            f"'{where}' lists the file '{name}', which is not a plain file name; do not trust this bundle"
        )
    return name


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON keeps it: numpy scalars become numbers, tuples lists, paths text."""
    if hasattr(value, "item") and not isinstance(value, Mapping):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise BundleError(f"'{where}' is {value}; a manifest keeps finite numbers only, leave the key out")
    if value is None or isinstance(value, str | int | float):
        return value
    raise BundleError(f"'{where}' is a {type(value).__name__}, which JSON does not keep; give text, numbers or lists")
