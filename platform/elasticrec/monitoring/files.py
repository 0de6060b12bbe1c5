"""The list of metrics in, the files of `deploy/monitoring` out, and the table of the docs."""

import json
from pathlib import Path
from typing import Any, Final

import yaml

from elasticrec.monitoring.dashboard import dashboard
from elasticrec.monitoring.rules import rules
from elasticrec.monitoring.series import ALL, Series

RULES: Final = "rules.yml"
PROMETHEUS: Final = "prometheus.yml"
DASHBOARD: Final = "grafana/dashboards/elasticrec.json"
SOURCES: Final = "grafana/provisioning/datasources/prometheus.yml"
PROVIDERS: Final = "grafana/provisioning/dashboards/elasticrec.yml"
DISCOVERY: Final = "/tmp/ray/prom_metrics_service_discovery.json"  # where Ray's head node writes it by default
_MARKS: Final = ("<!-- metrics: made by python -m elasticrec.monitoring -->", "<!-- end of metrics -->")
_HEADER: Final = "# Made by: python -m elasticrec.monitoring\n"
# Who is called out is everybody's own affair.
_ALERTING: Final = """\
# Alerts are computed here and told to nobody, until an Alertmanager is named:
# alerting:
#   alertmanagers:
#   - static_configs:
#     - targets:
#       - 127.0.0.1:9093
"""


def rendered() -> dict[str, str]:
    """Every file by its path below `deploy/monitoring`."""
    return {
        RULES: _yaml(rules()),
        PROMETHEUS: _yaml(prometheus({"file_sd_configs": [{"files": [DISCOVERY]}]})) + _ALERTING,
        DASHBOARD: json.dumps(dashboard(), indent=1) + "\n",
        SOURCES: _yaml(source("http://127.0.0.1:9090")),
        PROVIDERS: _yaml(provider("/var/lib/grafana/dashboards")),
    }


def write(folder: Path) -> None:
    """All of them."""
    for name, text in rendered().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def prometheus(discovery: dict[str, Any], interval_s: int = 10) -> dict[str, Any]:
    """Prometheus' configuration; `discovery`: how it finds Ray's nodes. The rules lie beside it."""
    interval = f"{interval_s}s"
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [RULES],
        "scrape_configs": [{"job_name": "ray", **discovery}],
    }


def source(url: str) -> dict[str, Any]:
    """Grafana's data source."""
    entry = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": url, "isDefault": True}
    return {"apiVersion": 1, "datasources": [entry]}


def provider(folder: str) -> dict[str, Any]:
    """Where Grafana finds dashboards."""
    entry = {"name": "elasticrec", "type": "file", "options": {"path": folder}}
    return {"apiVersion": 1, "providers": [entry]}


def documented(text: str) -> str:
    """A document with the table of all metrics between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, _, rest = text.partition(_MARKS[0])
    _, found, after = rest.partition(_MARKS[1])
    if not found:
        raise ValueError(f"the document has no '{_MARKS[0]}' and '{_MARKS[1]}' after it")
    return f"{before}{_MARKS[0]}\n{table()}{_MARKS[1]}{after}"


def table() -> str:
    """All metrics as Markdown."""
    lines = ["| metric | kind | unit | labels | |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_row, ALL)]) + "\n"


def _row(one: Series) -> str:
    labels = ", ".join(f"`{label}`" for label in one.labels)
    return f"| `{one.full_name}` | {one.kind} | {one.unit} | {labels} | {one.text} |"


def _yaml(values: dict[str, Any]) -> str:
    return _HEADER + yaml.safe_dump(values, sort_keys=False, width=1_000)
