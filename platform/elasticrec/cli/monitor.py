"""`elasticrec monitor`: Prometheus, and Grafana where it is installed, beside a running cluster until Ctrl-C."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import httpx
import yaml

from elasticrec.cli.service import require_free
from elasticrec.cli.web import get
from elasticrec.errors import ElasticRecError
from elasticrec.monitoring import files

DISCOVERY: Final = "prom_metrics_service_discovery.json"  # Ray's head node writes it into its temporary folder
_NAMES: Final = ("ray", "er-*")  # temporary folders of Ray, and of private clusters (`elasticrec serve run`)
_START_S: Final = 20.0
_STOP_S: Final = 10.0
_CONNECT_S: Final = 1.0


class MonitorError(ElasticRecError, RuntimeError):
    """Nothing can be watched, or with nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MonitorConfig:
    """`discovery`: a scrape_config's way to find Ray's nodes."""

    discovery: dict[str, Any]
    folder: Path
    port: int = 9090
    interval_s: int = 10


def monitor(
    dashboard: str = "",
    discovery: Path | None = None,
    targets: str = "",
    folder: Path = Path("runs/monitoring"),
    port: int = 9090,
    grafana_port: int = 3000,
    interval_s: int = 10,
) -> None:
    """Watches a running cluster until Ctrl-C; what was seen stays in the folder.

    Args:
        dashboard: URL of Ray's dashboard, which knows all nodes; by default that of RAY_API_SERVER_ADDRESS.
        discovery: Ray's prom_metrics_service_discovery.json, where the dashboard cannot be reached.
        targets: HOST:PORT of the nodes' metrics, with commas between, where neither can.
        folder: for the time series and the configuration.
        port: of Prometheus, on the loopback address.
        grafana_port: of Grafana, on the loopback address.
        interval_s: between two looks at each node.
    """
    found = find(dashboard, discovery, targets)
    config = MonitorConfig(discovery=found, folder=folder.absolute(), port=port, interval_s=interval_s)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_in_order())
        url = stack.enter_context(prometheus(config))
        print(f"Prometheus: {url} (rules: {url}/alerts)", flush=True)
        if (program := shutil.which("grafana-server")) is not None:
            print(f"Grafana: {stack.enter_context(grafana(program, config, grafana_port))}", flush=True)
        else:
            print(f"Grafana is not installed; its dashboard is {config.folder / files.DASHBOARD}", flush=True)
        print("Ctrl-C stops it", flush=True)
        while True:
            time.sleep(1)
            if not _answers(f"{url}/-/healthy"):
                raise MonitorError(f"Prometheus has ended; its log is {config.folder / 'prometheus.log'}")


def find(dashboard: str = "", discovery: Path | None = None, targets: str = "") -> dict[str, Any]:
    """How Prometheus finds the nodes: as told, else by the dashboard of the environment, else on this machine.

    Raises:
        MonitorError: there is no cluster, there are several, or a target is empty.
    """
    if targets:
        named = [target.strip() for target in targets.split(",")]
        if not all(named):
            raise MonitorError(
                f"--targets is '{targets}', and one of them is empty; give HOST:PORT, with commas between"
            )
        return {"static_configs": [{"targets": named}]}
    if discovery is not None:
        if not _lives(discovery):
            raise MonitorError(f"no node of '{discovery}' answers; is it of a cluster that still runs?")
        return {"file_sd_configs": [{"files": [str(discovery.absolute())]}]}
    told = dashboard or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_DASHBOARD_ADDRESS")
    return _by_dashboard(told.rstrip("/")) if told else _on_this_machine()


@contextlib.contextmanager
def prometheus(config: MonitorConfig) -> Iterator[str]:
    """Runs Prometheus with our rules; its URL. It ends with the block.

    Raises:
        MonitorError: it is not installed, its port is taken, or it does not start.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise MonitorError(
            "prometheus is not installed; 'apt-get install prometheus', 'dnf install golang-github-prometheus', "
            "'brew install prometheus', or put the binary of prometheus.io on the PATH"
        )
    require_free(config.port)
    files.write(config.folder)
    place = config.folder / files.PROMETHEUS
    place.write_text(yaml.safe_dump(files.prometheus(config.discovery, config.interval_s)), encoding="utf-8")
    place.chmod(0o600)  # it may hold the cluster's token
    command = [program, f"--config.file={place}", f"--storage.tsdb.path={config.folder / 'series'}"]
    command += [f"--web.listen-address=127.0.0.1:{config.port}", "--log.level=warn"]
    url = f"http://127.0.0.1:{config.port}"
    with _running(command, config.folder / "prometheus.log", f"{url}/-/ready"):
        yield url


@contextlib.contextmanager
def grafana(program: str, config: MonitorConfig, port: int) -> Iterator[str]:
    """Runs Grafana with our dashboard for whoever is on this machine; the dashboard's URL. It ends with the block."""
    require_free(port)
    folder = config.folder / "grafana"
    provisioning = folder / "provisioning"
    (config.folder / files.SOURCES).write_text(json.dumps(files.source(f"http://127.0.0.1:{config.port}")))
    (config.folder / files.PROVIDERS).write_text(json.dumps(files.provider(str(folder / "dashboards"))))
    settings = {
        "server.http_addr": "127.0.0.1",
        "server.http_port": port,
        "auth.anonymous.enabled": "true",
        "paths.data": folder / "data",
        "paths.provisioning": provisioning,
        "analytics.reporting_enabled": "false",
    }
    home = next(
        (path for path in map(Path, ("/usr/share/grafana", "/opt/homebrew/share/grafana")) if path.exists()), None
    )
    command = [program, *(["--homepath", str(home)] if home else []), *(f"cfg:{k}={v}" for k, v in settings.items())]
    with _running(command, config.folder / "grafana.log", f"http://127.0.0.1:{port}/api/health"):
        yield f"http://127.0.0.1:{port}/d/elasticrec"


def _by_dashboard(url: str) -> dict[str, Any]:
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    place = f"{url}/api/prometheus/sd"
    try:
        answer = get(place, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MonitorError(f"no Ray dashboard answers at {url}: {error}; start a cluster or give --dashboard") from None
    if answer.is_error:
        raise MonitorError(
            f"{place} answers {answer.status_code}; set RAY_AUTH_TOKEN to the cluster's, or give --targets"
        )
    authorization = {"authorization": {"type": "Bearer", "credentials": token}} if token else {}
    return {"http_sd_configs": [{"url": place, "refresh_interval": "5s", **authorization}]}


def _on_this_machine() -> dict[str, Any]:
    found = sorted({file for folder in _places() for name in _NAMES for file in folder.glob(f"{name}/{DISCOVERY}")})
    living = [file for file in found if _lives(file)]
    if len(living) > 1:
        named = " ".join(map(str, living))
        raise MonitorError(f"several clusters run on this machine; choose one by --discovery, of: {named}")
    if not living:
        raise MonitorError(
            "no Ray cluster runs on this machine; start one ('elasticrec serve run', 'ray start --head'), or give "
            "--dashboard, --discovery or --targets of another"
        )
    return {"file_sd_configs": [{"files": [str(living[0])]}]}


def _places() -> list[Path]:
    return [Path(tempfile.gettempdir()), Path("/tmp")]


def _lives(discovery: Path) -> bool:
    """Whether any node that it names listens."""
    try:
        groups = json.loads(discovery.read_text(encoding="utf-8"))
        targets = [target.rsplit(":", 1) for group in groups for target in group["targets"]]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return any(_listens(host, int(port)) for host, port in targets)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is not ignored (nohup), end the block as Ctrl-C does: programs in it end first."""
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _exit) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)  # as a shell tells of a signal


@contextlib.contextmanager
def _running(command: list[str], log: Path, ready: str) -> Iterator[None]:
    """A child that answers at `ready`; SIGTERM ends it, in order."""
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches us alone, and we end it.
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline_s = time.monotonic() + _START_S
        while not _answers(ready):
            if child.poll() is not None or time.monotonic() > deadline_s:
                ending = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
                raise MonitorError(f"{Path(command[0]).name} did not start; {log} ends:\n{ending}")
            time.sleep(0.1)
        yield
    finally:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answers(url: str) -> bool:
    try:
        return get(url, timeout_s=5).is_success
    except httpx.HTTPError:
        return False
