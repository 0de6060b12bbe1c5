"""`elasticrec serve …`: a service on this machine, and its keys."""

import time
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from elasticrec.artifact.bundle import open_bundle
from elasticrec.artifact.registry import resolve_reference
from elasticrec.cli.local_cluster import LocalClusterConfig, local_cluster
from elasticrec.cli.progress import bar
from elasticrec.cli.service import ServiceError, answers, deploy, require_free, require_taken
from elasticrec.data.sequences import open_store
from elasticrec.serving.auth import Scope, create_key, revoke_key
from elasticrec.serving.stores import absolute

PROBE_S, SILENT_PROBES = 5, 24
DEFAULT_KEYS = Path("runs/serving/keys.json")


def run(
    bundle: Annotated[str, tyro.conf.Positional],
    events: str = "runs/serving/events.sqlite",
    seed: Path | None = None,
    keys: Path | None = None,
    topology: Literal["fused", "split"] = "fused",
    replicas: int = 1,
    haproxy: bool = True,
    port: int = 8000,
) -> None:
    """Serves a bundle on a loopback address of this machine, from a private cluster, until Ctrl-C.

    Args:
        bundle: folder, URI, or REGISTRY#NAME@LABEL.
        events: event store: an SQLite file, or redis://….
        seed: prepared data set whose events known users start with.
        keys: key file (`elasticrec serve key`); without one nobody is asked for a key.
        topology: stages in one replica, or HTTP apart from the model.
        replicas: replicas that hold the model.
        haproxy: HAProxy as the ingress, instead of Ray's own proxy.
        port: of the HTTP service.
    """
    require_free(port)
    open_bundle(resolve_reference(bundle))  # told now, not by replicas that fail to start
    if seed:
        open_store(seed)
    paths = {"seed": seed, "keys": keys}
    arguments = {name: str(path.absolute()) for name, path in paths.items() if path} | {"events": absolute(events)}
    arguments |= {"bundle": _absolute(bundle), "topology": topology, "replicas": str(replicas)}
    require_taken(arguments)
    config = LocalClusterConfig(num_cpus=replicas + 1, train_slots=0, haproxy=haproxy, auth="token")
    with local_cluster(config) as cluster:
        with bar("starting the service"):
            url = deploy(cluster, arguments, port=port)
        print(f"serving on {url} (API: {url}/docs); Ctrl-C stops it", flush=True)
        silent = 0
        while silent < SILENT_PROBES:  # a busy or restarting service is left alone
            time.sleep(PROBE_S)
            silent = 0 if answers(url) else silent + 1
        raise ServiceError(f"nothing has answered on {url} for {SILENT_PROBES * PROBE_S} s; the service was stopped")


def key(name: Annotated[str, tyro.conf.Positional], scopes: str = "read,events", keys: Path = DEFAULT_KEYS) -> None:
    """Makes an API key and shows it once; the file keeps its hash only.

    Args:
        name: who it is for.
        scopes: what it may do, with commas between: read, events, admin.
        keys: the key file; made when it is not there.
    """
    wanted = tuple(scope.strip() for scope in scopes.split(","))
    print(create_key(keys, name, cast(tuple[Scope, ...], wanted)))


def revoke(name: Annotated[str, tyro.conf.Positional], keys: Path = DEFAULT_KEYS) -> None:
    """Takes a key back; running services follow within seconds.

    Args:
        name: who it was for.
        keys: the key file.
    """
    revoke_key(keys, name)
    print(f"'{name}' has no key any more")


def _absolute(bundle: str) -> str:
    """The cluster runs elsewhere: relative folders start here."""
    return bundle if "://" in bundle else str(Path(bundle).absolute())
