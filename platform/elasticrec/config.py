"""YAML or mappings in, nested frozen dataclasses out; unknown keys are errors that name the nearest one.

Every component declares one `@dataclass(frozen=True, kw_only=True, slots=True)`. A field whose type is a union of
dataclasses is chosen by the key `kind`, which each member declares as `kind: ClassVar[str]`.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from elasticrec.errors import ConfigError, suggestion

T = TypeVar("T")


def load(config_type: type[T], path: str | Path) -> T:
    """Reads a YAML file into `config_type`.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or a key or value does not fit.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file '{path}' does not exist; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"config file '{path}' cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}' is not valid YAML: {error}") from None
    if raw is not None and not isinstance(raw, Mapping):
        raise ConfigError(f"config file '{path}' holds a {type(raw).__name__}; it must hold keys and values")
    return from_mapping(config_type, raw or {})


def from_mapping(config_type: type[T], raw: Mapping[str, Any], where: str = "") -> T:
    """Builds `config_type` from plain values (the inverse of `to_mapping`).

    Raises:
        ConfigError: naming the key (dotted from the root), what was found and what would fit.
    """
    hints = typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type) if field.init}  # type: ignore[arg-type]
    kind = getattr(config_type, "kind", None)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "kind" and kind is not None:
            _literal((kind,), value, _join(where, key))
            continue
        if key not in fields:
            raise ConfigError(f"unknown key '{_join(where, str(key))}'{suggestion(str(key), fields)}")
        values[key] = _convert(hints[key], _with_kind(fields[key], hints[key], value), _join(where, key))
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise ConfigError(f"key '{_join(where, missing[0])}' is required; add it")
    return config_type(**values)


def to_mapping(config: Any) -> Any:
    """Turns a config into plain values that JSON and YAML can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = {"kind": config.kind} if hasattr(config, "kind") else {}
        return kind | {field.name: to_mapping(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_mapping(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_mapping(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def _with_kind(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """Where `kind` is left out, the default's is meant, unless only another kind has a key that is there."""
    if not isinstance(value, Mapping) or "kind" in value or get_origin(hint) not in (Union, types.UnionType):
        return value
    default: Any = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    if not hasattr(default, "kind"):
        return value
    members = [member for member in get_args(hint) if dataclasses.is_dataclass(member)]
    foreign = set(value) - _names(type(default))
    return value if any(foreign & _names(member) for member in members) else {"kind": default.kind, **value}


def _names(config_type: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_type)}


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin is typing.Literal:
        return _literal(get_args(hint), value, where)
    if origin in (Union, types.UnionType):
        return _union(get_args(hint), value, where)
    if origin in (tuple, list):
        return _sequence(hint, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{where}' must hold keys and values, got {value!r}")
        return from_mapping(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value not in choices:
        raise ConfigError(f"'{where}' is {value!r}{suggestion(str(value), map(str, choices))}")
    return value


def _union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    if len(members) == 1:
        return _convert(members[0], value, where)
    if all(dataclasses.is_dataclass(member) for member in members) and isinstance(value, Mapping):
        kinds = {member.kind: member for member in members}
        kind = _literal(tuple(kinds), value.get("kind"), _join(where, "kind"))
        return from_mapping(kinds[kind], value, where)
    for member in members:
        try:
            return _convert(member, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"'{where}' is {value!r}, expected one of {', '.join(map(str, members))}")


def _sequence(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ConfigError(f"'{where}' must be a list, got {value!r}")
    args = get_args(hint)
    if get_origin(hint) is list or (len(args) == 2 and args[1] is Ellipsis):
        converted = [_convert(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
        return converted if get_origin(hint) is list else tuple(converted)
    if len(args) != len(value):
        raise ConfigError(f"'{where}' needs {len(args)} values, got {len(value)}: {value!r}")
    return tuple(_convert(arg, entry, f"{where}[{i}]") for i, (arg, entry) in enumerate(zip(args, value, strict=True)))


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML 1.1 reads 1e-3 as a string
    misfit = not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)
    if misfit or (isinstance(value, float) and math.isnan(value)):  # NaN passes every comparison with a limit
        raise ConfigError(f"'{where}' must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return value
