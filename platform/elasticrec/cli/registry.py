"""`elasticrec registry …`: publish versions, move labels."""

import json
from typing import Annotated

import tyro

from elasticrec.artifact.location import locate
from elasticrec.artifact.registry import DEFAULT_LABEL, Registry, parse_reference, resolve_reference
from elasticrec.errors import InputError

CHOSEN = "chosen.json"  # what `elasticrec compress` leaves in its folder
DEFAULT_ROOT = "runs/registry"
Reference = Annotated[str, tyro.conf.Positional]


def publish(bundle: Reference, name: str, root: str = DEFAULT_ROOT, label: str | None = None) -> None:
    """Copies a bundle into the registry as the next version of a model.

    Args:
        bundle: folder, URI, REGISTRY#NAME@LABEL, or the folder of a sweep, whose chosen bundle is taken.
        name: of the model in the registry.
        root: folder or URI of the registry.
        label: point this label at the new version, too.
    """
    registry = Registry(root)
    version = registry.publish(resolve_reference(_chosen_of(bundle)), name)
    if label:
        registry.set_label(name, label, version)
    print(f"{root}#{name}@{version}" + (f" is {label}" if label else ""))


def promote(name: str, version: str, root: str = DEFAULT_ROOT, label: str = DEFAULT_LABEL, reason: str = "") -> None:
    """Points a label at a version; services that read the label at their next deployment serve it.

    Args:
        name: of the model.
        version: a version, a label, or `latest`.
        root: folder or URI of the registry.
        label: the label that moves.
        reason: kept in the label's history.
    """
    registry = Registry(root)
    move = registry.set_label(name, label, registry.version_of(name, version), reason=reason)
    print(f"{name}@{label} is version {move.version}")


def rollback(name: str, root: str = DEFAULT_ROOT, label: str = DEFAULT_LABEL, reason: str = "") -> None:
    """Points a label at the version it had before.

    Args:
        name: of the model.
        root: folder or URI of the registry.
        label: the label that moves.
        reason: kept in the label's history.
    """
    move = Registry(root).rollback(name, label, reason=reason)
    print(f"{name}@{label} is version {move.version}")


def list_versions(root: str = DEFAULT_ROOT) -> None:
    """Shows models, versions and labels.

    Args:
        root: folder or URI of the registry.
    """
    registry = Registry(root)
    names = registry.names()
    if not names:
        print(f"registry '{root}' is empty; publish a bundle with 'elasticrec registry publish'")
    for name in names:
        labels = registry.labels(name)
        for version in registry.versions(name):
            marks = sorted(label for label, at in labels.items() if at == version)
            print(f"{name}@{version}" + (f"  {', '.join(marks)}" if marks else ""))


def _chosen_of(bundle: str) -> str:
    if parse_reference(bundle) is not None:
        return bundle
    marker = locate(bundle) / CHOSEN
    if not marker.exists():
        return bundle
    try:
        return str(json.loads(marker.read())["bundle"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"'{marker}' is damaged; publish the bundle of one recipe by its folder") from None
