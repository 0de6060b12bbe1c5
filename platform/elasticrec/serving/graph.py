"""Typed arguments in, a Ray Serve application out: the stages in one replica (`fused`) or apart (`split`).

    serve run serve_apps.recommender:app bundle=runs/quickstart/registry#recommender@production

It, `options`, `opening` and `gateway_replica` are the modules of serving that know Ray.
"""

import logging
from typing import Any, Final

from ray import serve
from ray.serve import Application

from elasticrec.serving.arguments import Args
from elasticrec.serving.auth import KeyRing
from elasticrec.serving.fused_replica import FusedReplica
from elasticrec.serving.gateway_replica import GatewayReplica
from elasticrec.serving.labels import rollout_of
from elasticrec.serving.model_replica import ModelReplica
from elasticrec.serving.options import fused_options, gateway_options, model_options
from elasticrec.serving.rate import read_limits
from elasticrec.serving.setup import check_stages

__all__ = ["Args", "FusedReplica", "GatewayReplica", "ModelReplica", "app"]

_LOGGER: Final = logging.getLogger("ray.serve")


def app(args: Args) -> Application:
    """The application. Labels are resolved here, once; then `user_config` says which versions all replicas hold.

    Raises:
        ConfigError: the keys cannot be read, or a stage cannot be found.
        BundleError, RegistryError: there is no such bundle.
    """
    check_stages(args.how)
    placed = args.placed()
    _check_callers(placed)
    versions = {"user_config": rollout_of(args.bundle).plain()}
    if placed.topology == "fused":
        return _deploy(FusedReplica, fused_options(placed) | versions, placed)
    model = _deploy(ModelReplica, model_options(placed) | versions, placed)
    return _deploy(GatewayReplica, gateway_options(placed) | versions, placed, model)


def _check_callers(args: Args) -> None:
    """What is wrong with keys and rates is told here, not by replicas that fail to start."""
    if args.keys is None:
        _LOGGER.warning(
            "no API key is configured: Serve must listen on a loopback address, or replicas refuse to start"
        )
    else:
        KeyRing(args.keys)
    if args.rate:
        read_limits(args.rate)


def _deploy(replica: type, options: dict[str, Any], *arguments: Any) -> Application:
    if hasattr(replica, "__serve_build_asgi_app__"):
        replica = serve.ingress()(replica)
    return serve.deployment(**options)(replica).bind(*arguments)
