"""Arguments of the graph in; what Ray Serve is asked for each deployment out."""

from typing import Any, Final

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from elasticrec.serving.arguments import Args

BATCHES_PER_MODEL: Final = 2  # one is computed while the next one travels


def fused_options(args: Args) -> dict[str, Any]:
    """Of replicas that speak HTTP and hold the model."""
    return with_gpus(_ingress_options(args, args.replicas) | _scaling(args), args)


def gateway_options(args: Args) -> dict[str, Any]:
    """Of replicas that speak HTTP alone."""
    return _ingress_options(args, args.gateways)


def model_options(args: Args) -> dict[str, Any]:
    """Of replicas that hold the model alone."""
    calls = BATCHES_PER_MODEL * args.gateways * args.most_replicas  # all batches there can be, in the worst case at one
    options = _options(args, args.replicas, args.num_cpus) | _scaling(args) | {"max_ongoing_requests": calls}
    return with_gpus(options, args)


def with_gpus(options: dict[str, Any], args: Args) -> dict[str, Any]:
    """For replicas that hold the model."""
    return options | {"ray_actor_options": options["ray_actor_options"] | {"num_gpus": args.num_gpus}}


def _ingress_options(args: Args, replicas: int) -> dict[str, Any]:
    return _options(args, replicas, args.http_cpus) | {
        # Above our own limit, so that the answer to one too many is ours: application/problem+json.
        "max_ongoing_requests": 4 * args.max_ongoing_requests + 64,
        "logging_config": {"enable_access_log": False},  # its lines have the paths of users
        "max_queued_requests": args.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    }


def _options(args: Args, replicas: int, num_cpus: float) -> dict[str, Any]:
    return {
        "num_replicas": replicas,
        "max_ongoing_requests": args.max_ongoing_requests,
        "max_surge_percent": 100,  # a replica's successor answers before it goes; it needs a free place
        "ray_actor_options": {"num_cpus": num_cpus}
        | ({"label_selector": args.label_selector} if args.label_selector else {}),
    }


def _scaling(args: Args) -> dict[str, Any]:
    """In place of a fixed number of replicas, where more may come."""
    if args.max_replicas is None:
        return {}
    policy = {"latency_ms": args.target_latency_ms, "waiting": args.target_waiting}
    return {
        "num_replicas": "auto",
        "autoscaling_config": AutoscalingConfig(
            min_replicas=args.min_replicas,
            initial_replicas=min(max(args.replicas, args.min_replicas), args.max_replicas),
            max_replicas=args.max_replicas,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            look_back_period_s=4.0,
            metrics_interval_s=1.0,
            policy=AutoscalingPolicy(
                policy_function="elasticrec.serving.autoscale:LatencyPolicy", policy_kwargs=policy
            ),
        ),
    }
