"""`elasticrec registry …`: publish versions, move labels, and take running applications along.

With RAY_ADDRESS set (a job has it) a move of production, canary or shadow reaches the application that serves the
model: its replicas load and check the version first, the label moves when all have, then they answer by it.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import tyro

from elasticrec.artifact.location import locate
from elasticrec.artifact.registry import (
    DEFAULT_LABEL,
    Move,
    Registry,
    check_label,
    parse_reference,
    resolve_reference,
)
from elasticrec.cli.publishing import publish_ready
from elasticrec.cli.rollout import Change, label_of, running
from elasticrec.cli.service import NAME
from elasticrec.errors import ConfigError, InputError
from elasticrec.serving.labels import CANARY, SHADOW

CHOSEN = "chosen.json"  # what `elasticrec compress` leaves in its folder
DEFAULT_ROOT = "runs/registry"
Reference = Annotated[str, tyro.conf.Positional]


def publish(bundle: Reference, name: str, root: str = DEFAULT_ROOT, label: str | None = None) -> None:
    """Copies a bundle into the registry as the next version of a model.

    Args:
        bundle: folder, URI, REGISTRY#NAME@LABEL, or the folder of a sweep, whose chosen bundle is taken.
        name: of the model in the registry.
        root: folder or URI of the registry.
        label: point this label at the new version, too; no application is told. Not canary or shadow: these take a
            share, and have commands of their own.
    """
    registry, source = Registry(root), _chosen_of(bundle)
    if label is not None:
        _require_answering(label)
        check_label(label)
    version = publish_ready(registry, resolve_reference(source), name)
    print(f"{root}#{name}@{version}")
    if label is not None:
        with registry.moving(name, f"publish --label {label}"):
            registry.set_label(name, label, version)
        print(f"'{label}' is there; no application was told ('elasticrec registry promote' tells one)")


def promote(
    name: str, version: str, root: str = DEFAULT_ROOT, label: str = DEFAULT_LABEL, reason: str = "", app: str = NAME
) -> None:
    """Points a label at a version. The application that serves the label moves to it without a failed request.

    Args:
        name: of the model.
        version: a version, a label, or `latest`.
        root: folder or URI of the registry.
        label: the label that moves; canary and shadow have commands of their own.
        reason: kept in the label's history.
        app: the application on the cluster of RAY_ADDRESS that is told.
    """
    _require_answering(label)
    registry = Registry(root)
    with registry.moving(name, f"promote --version {version}"):
        chosen = registry.version_of(name, version)
        uri = registry.resolve(name, chosen)
        _move(
            registry,
            name,
            label,
            app,
            lambda rollout: replace(rollout, production=uri),
            lambda: registry.set_label(name, label, chosen, reason=reason),
        )


def rollback(
    name: str,
    root: str = DEFAULT_ROOT,
    label: str = DEFAULT_LABEL,
    reason: str = "",
    app: str = NAME,
    leaving: str | None = None,
) -> None:
    """Points a label at the version it had before, in the same way.

    Args:
        name: of the model.
        root: folder or URI of the registry.
        label: the label that moves; canary and shadow have commands of their own.
        reason: kept in the label's history.
        app: the application on the cluster of RAY_ADDRESS that is told.
        leaving: the version that the label is expected to be at; elsewhere nothing moves, so a wish that comes twice is
            fulfilled once.
    """
    _require_answering(label)
    registry = Registry(root)
    with registry.moving(name, "rollback"):
        if leaving is not None and (now := registry.version_of(name, label)) != leaving:
            raise ConfigError(f"'{label}' of '{name}' is at version {now}, not {leaving}: somebody moved it before")
        uri = registry.resolve(name, registry.version_before(name, label))
        _move(
            registry,
            name,
            label,
            app,
            lambda rollout: replace(rollout, production=uri),
            lambda: registry.rollback(name, label, reason=reason),
        )


def canary(
    name: str, version: str, percent: float, root: str = DEFAULT_ROOT, reason: str = "", app: str = NAME
) -> None:
    """Answers a share of the users by another version, always the same ones; 0 ends it.

    Args:
        name: of the model.
        version: a version, a label, or `latest`.
        percent: of the users.
        root: folder or URI of the registry.
        reason: kept in the label's history.
        app: the application on the cluster of RAY_ADDRESS that is told.
    """
    _part(CANARY, name, version, percent, root, reason, app)


def shadow(
    name: str, version: str, percent: float = 100.0, root: str = DEFAULT_ROOT, reason: str = "", app: str = NAME
) -> None:
    """Asks another version beside the one that answers and counts what they have in common; 0 ends it.

    Args:
        name: of the model.
        version: a version, a label, or `latest`.
        percent: of the requests.
        root: folder or URI of the registry.
        reason: kept in the label's history.
        app: the application on the cluster of RAY_ADDRESS that is told.
    """
    _part(SHADOW, name, version, percent, root, reason, app)


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


def _require_answering(label: str) -> None:
    """Raises ConfigError for a label that answers beside production: it must never take production's place."""
    if label in (CANARY, SHADOW):
        raise ConfigError(
            f"--label is '{label}', which takes a share beside production; move it with 'elasticrec registry {label} "
            "--percent …', and end it with --percent 0"
        )


def _part(part: str, name: str, version: str, percent: float, root: str, reason: str, app: str) -> None:
    if not 0 <= percent <= 100:
        raise ConfigError(f"--percent is {percent}; give 0 to 100")
    registry = Registry(root)
    with registry.moving(name, f"{part} --version {version} --percent {percent:g}"):
        chosen = registry.version_of(name, version)
        uri = registry.resolve(name, chosen) if percent else None
        change: Change = {
            CANARY: lambda rollout: replace(rollout, canary=uri, canary_percent=percent),
            SHADOW: lambda rollout: replace(rollout, shadow=uri, shadow_percent=percent),
        }[part]
        _move(
            registry,
            name,
            part,
            app,
            change,
            lambda: registry.set_label(name, part, chosen, reason=reason, percent=percent),
        )
    print(f"{part} takes {percent:g} %")


def _move(registry: Registry, name: str, label: str, app: str, change: Change, move_label: Callable[[], Move]) -> None:
    """The label and the application that serves it; the label stays where it is when a replica refuses the bundle."""
    moved: list[Move] = []
    told = f"no application '{app}' was told"
    with running(registry, name, app) as application:
        if application is None or label not in (label_of(application), CANARY, SHADOW):
            moved.append(move_label())
        else:
            application.move(change(application.current()), lambda: moved.append(move_label()))
            told = f"every replica of '{app}' answers by it"
    print(f"{name}@{label} is version {moved[0].version}; {told}")


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
