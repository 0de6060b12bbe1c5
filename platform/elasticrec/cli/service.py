"""Arguments of the serving graph in, a service that answers on a local cluster out; through Serve's REST API."""

import socket
import time
from collections.abc import Mapping
from typing import Any

import httpx
from pydantic import ValidationError

from elasticrec.cli.local_cluster import LocalCluster
from elasticrec.cli.web import connect, get
from elasticrec.errors import ConfigError, ElasticRecError
from elasticrec.serving.arguments import Args
from elasticrec.serving.auth import KeyRing

GRAPH = "elasticrec.serving.graph:app"
NAME = "recommender"


class ServiceError(ElasticRecError, RuntimeError):
    """The service did not start."""


def deploy(
    cluster: LocalCluster, arguments: dict[str, Any], *, port: int | None = None, timeout_s: float = 120.0
) -> str:
    """Deploys the graph as `serve deploy` does and waits until it answers. Returns its URL.

    Args:
        port: of the HTTP service on the loopback address; the cluster's free one when not given.

    Raises:
        ServiceError: it failed to start, with the reason that Serve gives, or took too long.
    """
    port = port or cluster.http_port
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": NAME, "route_prefix": "/", "import_path": GRAPH, "args": arguments}],
    }
    url = f"http://127.0.0.1:{port}"
    with connect(base_url=cluster.dashboard_url, headers=cluster.headers, timeout=60) as api:
        answer = api.put("/api/serve/applications/", json=config)
        if answer.is_error:
            raise ServiceError(f"Serve refused the configuration ({answer.status_code}): {answer.text}")
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            # Both: replicas of the deployment before answer until they are drained.
            if _is_running(api) and is_ready(url):
                return url
            time.sleep(0.2)
    raise ServiceError(f"the service did not answer within {timeout_s:g} s; see the Serve logs in the Ray dashboard")


def require_free(port: int) -> None:
    """Raises ServiceError when there is no such port, or something listens on that port of the loopback address."""
    if not 1 <= port <= 65_535:
        raise ServiceError(f"port {port} is none; give one of 1 to 65535")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ServiceError(f"something listens on port {port} already; stop it or give another --port")


def require_taken(arguments: Mapping[str, str]) -> None:
    """Raises ConfigError when the graph does not take these arguments, or the key file that they name has no key."""
    try:
        args = Args.model_validate(arguments)
    except ValidationError as error:
        wrong = ((".".join(map(str, one["loc"])), one["msg"], one["input"]) for one in error.errors())
        told = "; ".join(f"{name} is '{value}': {message}" for name, message, value in wrong)
        raise ConfigError(f"the service does not take this: {told}") from None
    if args.keys is not None:
        KeyRing(args.keys)


def answers(url: str) -> bool:
    """Whether anything answers there, be it that it is busy."""
    try:
        get(f"{url}/healthz", timeout_s=30)
    except httpx.HTTPError:
        return False
    return True


def is_ready(url: str) -> bool:
    """Whether a replica answers and can recommend."""
    try:
        return get(f"{url}/readyz", timeout_s=5).status_code == 200
    except httpx.HTTPError:
        return False


def _is_running(api: httpx.Client) -> bool:
    """Whether Serve is done. Raises ServiceError when it has given up."""
    state = api.get("/api/serve/applications/").json()["applications"].get(NAME, {})
    if state.get("status") == "DEPLOY_FAILED":
        reasons = [state.get("message", ""), *(one.get("message", "") for one in state.get("deployments", {}).values())]
        raise ServiceError(f"the service failed to start: {'; '.join(filter(None, reasons)) or 'no reason given'}")
    return bool(state.get("status") == "RUNNING")
