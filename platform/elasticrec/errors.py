"""Errors that a user can act on: each says what is wrong, what was found and what to do."""

import difflib
from collections.abc import Iterable


class ElasticRecError(Exception):
    """Base of all errors that are shown to a user as one message, without a stack trace."""


class InputError(ElasticRecError, ValueError):
    """The user's data cannot be used as it is."""


class ConfigError(ElasticRecError, ValueError):
    """A setting is unknown, impossible or does not fit another one."""


class FetchError(ElasticRecError, OSError):
    """No mirror of a data set delivered the expected files."""


class BundleError(ElasticRecError, ValueError):
    """A bundle is damaged, incomplete or of a schema this version cannot read."""


class ExportError(ElasticRecError, ValueError):
    """A network cannot be written in the format that was asked for."""


class RegistryError(ElasticRecError, ValueError):
    """A version or label cannot be read or moved as asked."""


class CheckpointError(ElasticRecError, ValueError):
    """A training checkpoint is torn, corrupt or belongs to another run."""


class TrainingError(ElasticRecError, RuntimeError):
    """Training cannot go on."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known name nearest to `name`, else the list of known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(names) or 'none'}"
