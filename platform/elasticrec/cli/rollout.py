"""A wanted change of versions in; the running application moved to it, or left as it was with the reason, out.

Which versions replicas hold is their `user_config`: a deployment of the same configuration with another one restarts
nothing (`serve.run()` would). What replicas made of it they tell themselves, each one of them.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from elasticrec.artifact.location import locate
from elasticrec.artifact.registry import Reference, Registry, parse_reference
from elasticrec.cli.connection import driver
from elasticrec.cli.service import NAME
from elasticrec.errors import ElasticRecError
from elasticrec.serving.rollout import Rollout, settled, staged

_POLL_S: Final = 0.2
Change = Callable[[Rollout], Rollout]
# By deployment, what each of its replicas says; none where they run and do not answer, empty where none runs.
States = Mapping[str, Sequence[Mapping[str, Any]] | None]


class RolloutError(ElasticRecError, RuntimeError):
    """A version was refused, or the application did not take it; what was live stays."""


@dataclass(frozen=True, kw_only=True)
class Application:
    """A running application of this package, through Serve's REST API and its replicas."""

    name: str
    client: Any  # ray.dashboard.modules.serve.sdk.ServeSubmissionClient
    timeout_s: float = 300.0

    @property
    def reference(self) -> str:
        """The bundle that it was deployed with."""
        return str(self._deployed()["args"]["bundle"])

    def current(self) -> Rollout:
        """What it was last told to serve."""
        for state in (state for states in self._states().values() for state in states or ()):
            if "live" in state:  # one that has just begun has not
                return Rollout.of(state["live"])
        deployments = self._deployed().get("deployments") or []
        told = [entry["user_config"] for entry in deployments if entry.get("user_config")]
        if not told:
            raise RolloutError(f"application '{self.name}' has no replica that could say what it serves; start one")
        return Rollout.of(told[0])

    def move(self, wanted: Rollout, between: Callable[[], None]) -> None:
        """Everywhere loaded and checked, then `between`, then everywhere live.

        Raises:
            RolloutError: a replica refuses a bundle, or none runs to check it; the application keeps what it held.
        """
        live = self.current()
        try:
            self._tell(staged(live, wanted), checks=True)
        except BaseException:  # whatever went wrong, nobody goes on loading what nobody wants
            self._deploy(live)
            raise
        between()
        self._tell(replace(wanted, held=staged(wanted, live).held))  # answers under way may still ask for what was
        self._tell(settled(live, wanted))

    def _tell(self, rollout: Rollout, *, checks: bool = False) -> None:
        self._deploy(rollout)
        deadline_s = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline_s:
            states = self._states()
            if answered(states, rollout, checks=checks) and self._is_settled(states):
                return
            time.sleep(_POLL_S)
        raise RolloutError(
            f"not every replica of '{self.name}' took it within {self.timeout_s:g} s; see 'serve status'"
        )

    def _deploy(self, rollout: Rollout) -> None:
        details = self.client.get_serve_details()
        applications = [
            entry["deployed_app_config"] for entry in details["applications"].values() if entry["deployed_app_config"]
        ]
        config = next(entry for entry in applications if entry["name"] == self.name)
        names = details["applications"][self.name]["deployments"]
        config["deployments"] = [
            _overrides(config, name) | {"name": name, "user_config": rollout.plain()} for name in names
        ]
        options = {key: value for key, value in (details.get("http_options") or {}).items() if key in ("host", "port")}
        self.client.deploy_applications(
            {"proxy_location": details["proxy_location"], "http_options": options, "applications": applications}
        )

    def _is_settled(self, states: States) -> bool:
        """Whether Serve has no replica left that it wants to change, and each has said what it made of it: while Serve
        tells one, nobody can ask it."""
        found = self.client.get_serve_details()["applications"][self.name]
        if found["status"] == "DEPLOY_FAILED":
            raise RolloutError(f"application '{self.name}' failed: {found.get('message', 'no reason given')}")
        return all(
            entry["status"] == "HEALTHY" and len(states.get(name) or ()) == _running(entry)
            for name, entry in found["deployments"].items()
        )

    def _states(self) -> States:
        """What each replica says of itself, gateways first."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import DeploymentUnavailableError

        deployments = self.client.get_serve_details()["applications"][self.name]["deployments"]
        states: dict[str, list[dict[str, Any]] | None] = {}
        for name in sorted(deployments, key=lambda name: name == "ModelReplica"):
            if all(replica["state"] == "STOPPING" for replica in deployments[name].get("replicas") or ()):
                states[name] = []
                continue
            try:
                handle = serve.get_deployment_handle(name, self.name)
                states[name] = list(handle.broadcast("rollout_state").results(timeout_s=30)) or None
            except (DeploymentUnavailableError, RayError, TimeoutError):
                states[name] = None
        return states

    def _deployed(self) -> dict[str, Any]:
        deployed: dict[str, Any] = self.client.get_serve_details()["applications"][self.name]["deployed_app_config"]
        return deployed


def _running(deployment: Mapping[str, Any]) -> int:
    return sum(replica["state"] != "STOPPING" for replica in deployment.get("replicas") or ())


def answered(states: States, rollout: Rollout, *, checks: bool) -> bool:
    """Whether all replicas were told and took it; a deployment that has replicas and does not answer did not yet.

    Raises:
        RolloutError: one that was told refuses a bundle; or, where they are to check it, a deployment has none.
    """
    idle = [name for name, found in states.items() if found is not None and not found]
    if checks and (idle or not states):
        raise RolloutError(
            f"no replica of {', '.join(idle) or 'any deployment'} runs that could check the bundle (scaled to zero, or "
            "not started yet); send a request or set min_replicas=1, then repeat the command"
        )
    said = [state for found in states.values() for state in found or ()]
    asked = [state.get("told") == state.get("asked") == rollout.plain() for state in said]
    refused = {uri: reason for state in said for uri, reason in state.get("refused", {}).items()}
    if refused and any(asked):
        raise RolloutError("; ".join(refused.values()))
    return None not in states.values() and all(asked)


@contextmanager
def running(registry: Registry, name: str, app: str = NAME) -> Iterator[Application | None]:
    """The application that serves the registry's model `name` on the cluster of RAY_ADDRESS; none where there is none.

    Raises:
        RolloutError: it serves another model or one of another registry, or was started in a way that cannot be changed
            without a restart.
    """
    if not os.environ.get("RAY_ADDRESS"):
        yield None
        return
    with driver(os.environ["RAY_ADDRESS"]):
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        client = ServeSubmissionClient(_dashboard_url())
        found = client.get_serve_details().get("applications", {}).get(app)
        if found is None:
            yield None
            return
        if found["deployed_app_config"] is None:
            raise RolloutError(
                f"application '{app}' was started by 'serve run', which can only restart it; deploy it with 'serve "
                "deploy' or 'elasticrec serve run', then its versions change while it answers"
            )
        application = Application(name=app, client=client)
        _check_serves(application, registry, name)
        yield application


def _check_serves(application: Application, registry: Registry, name: str) -> None:
    """Raises RolloutError when the application serves another model, or one of another registry."""
    parsed = parse_reference(application.reference)
    if parsed is None or parsed.name != name:
        raise RolloutError(
            f"application '{application.name}' serves '{application.reference}', which is no label of '{name}'; name "
            "its own model, or another application with --app"
        )
    root = _root_of(application, parsed)
    if _comparable(root) != _comparable(registry.root.uri):
        raise RolloutError(
            f"application '{application.name}' serves '{name}' of the registry '{root}', not of '{registry.root}'; "
            "name its own registry with --root, or another application with --app"
        )


def _root_of(application: Application, parsed: Reference) -> str:
    """A relative root starts where the application was built; only the bundle that it serves says where that was."""
    if "://" in parsed.root or os.path.isabs(parsed.root):
        return parsed.root
    production = application.current().production
    return production.removesuffix(f"/{parsed.name}/versions/{production.rpartition('/')[2]}")


def _comparable(root: str) -> str:
    """One text for all names of a local folder. Other places are not asked: who forgot --root may not reach them."""
    if "://" in root and not root.startswith("file://"):
        return root.rstrip("/")
    return os.path.realpath(locate(root).path)


def label_of(application: Application) -> str:
    """The label that is production for the application."""
    parsed = parse_reference(application.reference)
    assert parsed is not None  # `running` looked
    return parsed.ref


def _overrides(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next((dict(entry) for entry in config.get("deployments") or [] if entry["name"] == name), {})


def _dashboard_url() -> str:
    """Where the REST API is: as `serve deploy` takes it, else as the cluster says."""
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        if os.environ.get(variable):
            return os.environ[variable]
    from ray._private.worker import get_dashboard_url

    return f"http://{get_dashboard_url()}"
