"""The list of metrics and what is made of it: PromQL, rules that fire, files that are as committed, a ledger, drift."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from elasticrec.cli import monitor
from elasticrec.cli.local_cluster import free_port
from elasticrec.cli.monitor import MonitorError
from elasticrec.errors import ConfigError
from elasticrec.monitoring import dashboard, files, rules, series
from elasticrec.monitoring.drift import (
    MIN_VALUES,
    WINDOW_S,
    Reference,
    Window,
    popularity_edges,
    reference,
    stability_index,
    tracked,
)
from elasticrec.monitoring.instruments import Instruments
from elasticrec.monitoring.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
DEPLOYED = ROOT / "deploy" / "monitoring"


def test_committed_files_are_what_the_list_makes() -> None:
    for name, text in files.rendered().items():
        assert (DEPLOYED / name).read_text(encoding="utf-8") == text, f"{name}: run python -m elasticrec.monitoring"
    document = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert files.documented(document) == document, "run python -m elasticrec.monitoring"


def test_names_have_their_units_and_are_there_once() -> None:
    names = [one.name for one in series.ALL]
    assert len(names) == len(set(names)) > 30
    for one in series.ALL:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", one.name)
        assert one.unit not in ("ms", "s", "bytes") or one.name.endswith(f"_{one.unit}"), one.name
        assert (one.kind == "distribution") == bool(one.edges)
        assert list(one.edges) == sorted(one.edges)


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expression for _, expression in dashboard.queries())
    shown += json.dumps(rules.rules())
    assert [one.name for one in series.ALL if f"ray_{one.full_name}" not in shown] == []


def test_a_misspelt_label_or_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no label 'rout'.*route"):
        series.REQUESTS.rate("5m", by=["rout"])
    with pytest.raises(ConfigError, match="no label 'le'"):
        series.REQUEST_MS.select("count", le="5")
    with pytest.raises(ConfigError, match="has parts"):
        series.REQUESTS.rate("5m", "bucket")
    with pytest.raises(ConfigError, match="no bucket"):
        series.REQUEST_MS.edge(201)
    assert series.REQUESTS.select(status="=~5..") == 'ray_elasticrec_requests_total{status=~"5.."}'


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_files() -> None:
    promtool("check", "rules", str(DEPLOYED / files.RULES))
    promtool("check", "config", "--syntax-only", str(DEPLOYED / files.PROMETHEUS))


def test_alerts_fire_when_a_budget_burns_and_not_otherwise(tmp_path: Path) -> None:
    """Two hours of a service with 5 % errors, all events late and quick answers, as promtool computes them."""
    route = '{route="/v1/recommend"}'
    samples = {
        'ray_elasticrec_requests_total{route="/v1/recommend",status="200"}': "0+95x240",
        'ray_elasticrec_requests_total{route="/v1/recommend",status="500"}': "0+5x240",
        f"ray_elasticrec_request_ms_count_total{route}": "0+100x240",
        'ray_elasticrec_request_ms_bucket_total{route="/v1/recommend",le="200"}': "0+100x240",
        "ray_elasticrec_event_lag_ms_count_total": "0+10x240",
        'ray_elasticrec_event_lag_ms_bucket_total{le="1000"}': "0+0x240",
        'ray_elasticrec_drift{of="scores",version="films:2"}': "0.3x240",
        'ray_elasticrec_drift{of="items",version="films:2"}': "0.2x240",
    }
    named = {"severity": "page", "windows": "1h/5m"}, {"severity": "page", "windows": "6h/30m"}
    tickets = {"severity": "ticket", "windows": "1d/2h"}, {"severity": "ticket", "windows": "3d/6h"}
    drifted = {"severity": "ticket", "of": "scores", "version": "films:2"}
    expected = {
        "ElasticrecAvailabilityBurns": [(labels, "5% are bad") for labels in (*named, *tickets)],
        "ElasticrecFreshnessBurns": [(labels, "100% are bad") for labels in (*named, *tickets)],
        "ElasticrecLatencyBurns": [],
        "ElasticrecDrift": [(drifted, "0.3")],
    }
    require_alerts(tmp_path, samples, {"2h": expected})


def require_alerts(
    folder: Path, samples: dict[str, str], expected: dict[str, dict[str, list[tuple[dict[str, str], str]]]]
) -> None:
    """Of series with a sample every 30 s: labels and value of the alerts that fire at a time, by their names."""
    told = {
        rule["alert"] + str(rule["labels"].get("windows", "")): rule["annotations"]
        for group in rules.rules()["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }

    def annotated(name: str, labels: dict[str, str], value: str) -> dict[str, Any]:
        annotations = told[name + labels.get("windows", "")]
        annotations = annotations | {"share" if "share" in annotations else "value": value}
        return {"exp_labels": labels, "exp_annotations": annotations}

    checks = [
        {"eval_time": time, "alertname": name, "exp_alerts": [annotated(name, *one) for one in found]}
        for time, alerts in expected.items()
        for name, found in alerts.items()
    ]
    given = [{"series": name, "values": values} for name, values in samples.items()]
    test = {"rule_files": [str(DEPLOYED / files.RULES)], "evaluation_interval": "30s"}
    test |= {"tests": [{"interval": "30s", "input_series": given, "alert_rule_test": checks}]}
    (folder / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    promtool("test", "rules", str(folder / "test.yml"))


def test_a_run_that_hangs_stalls_and_one_that_has_ended_does_not(tmp_path: Path) -> None:
    """Ray tells the counter of both for ever; the gauge of the one ends, or is no number any more."""
    samples = {
        'ray_elasticrec_train_tokens_total{run="hangs"}': "0+9x20 180x60",
        'ray_elasticrec_train_starts{run="hangs"}': "1x80",
        'ray_elasticrec_train_tokens_total{run="ended"}': "0+9x20 180x60",
        'ray_elasticrec_train_starts{run="ended"}': "1x20 stale",
        'ray_elasticrec_train_tokens_total{run="over"}': "0+9x20 180x60",
        'ray_elasticrec_train_starts{run="over"}': "1x20" + 60 * " NaN",
    }
    stalled: list[tuple[dict[str, str], str]] = [({"severity": "ticket", "run": "hangs"}, "0")]
    require_alerts(
        tmp_path, samples, {"9m": {"ElasticrecTrainingStalls": []}, "35m": {"ElasticrecTrainingStalls": stalled}}
    )


def test_an_outage_is_told_by_what_is_not_there(tmp_path: Path) -> None:
    """One node of three dies after ten minutes, with the only replica; after twenty the others follow."""
    samples = {
        'up{job="ray",instance="a"}': "1x40 _x200",
        'up{job="ray",instance="b"}': "1x40 _x200",
        'up{job="ray",instance="c"}': "1x20 stale",
        'ray_elasticrec_in_flight{replica="r"}': "3x20 stale",
    }
    gone: list[tuple[dict[str, str], str]] = [({"severity": "ticket"}, "-1")]
    paged: list[tuple[dict[str, str], str]] = [({"severity": "page"}, "0")]
    names = ("ElasticrecNodeGone", "ElasticrecNoReplica", "ElasticrecSilent")
    expected = {"9m": ([], [], []), "14m": (gone, paged, []), "40m": ([], paged, paged), "90m": ([], [], paged)}
    require_alerts(tmp_path, samples, {time: dict(zip(names, found, strict=True)) for time, found in expected.items()})


def test_the_section_for_an_alertmanager_is_one(tmp_path: Path) -> None:
    text = (DEPLOYED / files.PROMETHEUS).read_text(encoding="utf-8")
    before, _, commented = text.partition("# alerting:")
    place = tmp_path / files.PROMETHEUS
    place.write_text(before + "alerting:" + commented.replace("\n# ", "\n"), encoding="utf-8")
    assert yaml.safe_load(place.read_text(encoding="utf-8"))["alerting"]["alertmanagers"]
    promtool("check", "config", "--syntax-only", str(place))


class Recorder:
    """Stands in for `ray.util.metrics`: the newest level and the sum of counts, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[str, ...]], float] = {}

    def module(self) -> Any:
        return SimpleNamespace(Counter=self._instrument, Gauge=self._instrument)

    def _instrument(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert description

        def key(tags: dict[str, str]) -> tuple[str, tuple[str, ...]]:
            assert tuple(tags) == tag_keys
            return name, tuple(tags.values())

        def inc(value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses it"
            self.values[key(tags)] = self.values.get(key(tags), 0.0) + value

        def put(value: float, tags: dict[str, str]) -> None:
            self.values[key(tags)] = value

        return SimpleNamespace(inc=inc, set=put)


def test_what_is_written_comes_out_once_with_its_buckets() -> None:
    ledger, recorder = Ledger(), Recorder()
    instruments = Instruments(recorder.module(), hold_s=0)
    ledger.add(series.REQUESTS, 2, "/v1/events", "200")
    ledger.add(series.DEGRADED, 0)
    for value in (1, 7, 7, 9_999):
        ledger.observe(series.QUEUE_MS, value)
    level = [3.0]
    ledger.level(series.WAITING, lambda: level[0])
    for _ in range(2):
        instruments.write(ledger.turn())
    values = recorder.values
    assert values["elasticrec_requests", ("/v1/events", "200")] == pytest.approx(2)
    assert values["elasticrec_degraded_answers", ()] == pytest.approx(0, abs=1e-9)  # known, and nothing yet
    assert values["elasticrec_waiting", ()] == 3
    assert values["elasticrec_queue_ms_count", ()] == pytest.approx(4)
    assert values["elasticrec_queue_ms_sum", ()] == pytest.approx(10_014)
    buckets = {labels[0]: values[name, labels] for name, labels in values if name == "elasticrec_queue_ms_bucket"}
    assert [round(buckets[edge]) for edge in ("1", "2", "5", "10", "5000", "+Inf")] == [1, 1, 1, 3, 3, 4]
    ledger.forget(series.WAITING)
    instruments.write(ledger.turn())
    assert np.isnan(values["elasticrec_waiting", ()])  # or Ray would go on telling 3


def test_the_first_failures_of_a_kind_are_a_rise() -> None:
    """`rate` sees no rise where a counter begins, so it is told as next to nothing for one of Ray's reports."""
    ledger, recorder, now_s = Ledger(), Recorder(), [0.0]
    instruments = Instruments(recorder.module(), hold_s=10, now_s=lambda: now_s[0])
    key = "elasticrec_requests", ("/v1/recommend", "500")
    told = []
    for second in range(14):
        now_s[0] = float(second)
        ledger.add(series.REQUESTS, 3 if second < 2 or second == 12 else 0, *key[1])
        instruments.write(ledger.turn())
        told.append(round(recorder.values[key]))
    assert told == [0] * 10 + [6, 6, 9, 9]


def test_stability_index_by_hand() -> None:
    assert stability_index((0.5, 0.5), np.array([50, 50])) == pytest.approx(0)
    by_hand = (0.8 - 0.5) * np.log(0.8 / 0.5) + (0.2 - 0.5) * np.log(0.2 / 0.5)
    assert stability_index((0.5, 0.5), np.array([80, 20])) == pytest.approx(by_hand)
    assert stability_index((0.5, 0.5), np.array([100, 0])) < 10  # finite, though a bin has nothing


def test_popularity_bins_hold_equal_parts_of_the_events() -> None:
    count_I = np.array([0, *[30] * 10, *[3] * 100])  # ten items have half of all events
    edges = popularity_edges(count_I)
    assert edges.tolist() == [2, 4, 6, 8, 10, 30, 50, 70, 90]
    assert popularity_edges(np.array([0, 100, 1, 1])).tolist() == [1]


def test_drift_is_none_at_first_small_for_the_same_and_large_for_others() -> None:
    random = np.random.default_rng(0)
    count_I = np.array([0, *range(100, 0, -1)])
    top_CK = random.integers(1, 101, (500, 10))
    score_CK = np.sort(random.normal(5, 1, (500, 10)).astype(np.float32), axis=1)[:, ::-1]
    top_CK[:3, 5:] = 0  # short answers
    known = Reference.of(json.loads(json.dumps(reference(top_CK, score_CK, count_I).plain())))
    assert known is not None
    found = tracked(known, count_I)
    found["scores"].add(score_CK[0].tolist())
    assert found["scores"].index() is None
    for row in random.normal(5, 1, (MIN_VALUES // 5, 10)):
        found["scores"].add(row.tolist())
        found["items"].add(random.integers(1, 101, 10).tolist())
        found["events"].add(random.integers(81, 101, 10).tolist())
    small = [found[name].index() for name in ("scores", "items")]
    assert all(value is not None and value < 0.1 for value in small), small
    assert (found["events"].index() or 0) > 1  # all of them rare items
    for row in random.normal(8, 1, (MIN_VALUES // 5, 10)):
        found["scores"].add(row.tolist())
    assert (found["scores"].index() or 0) > 0.25


def test_without_a_reference_only_events_are_watched() -> None:
    for raw in (None, 7, {}, {"score_edges": [1], "score_share": ["x"], "item_share": []}):
        assert Reference.of(raw) is None
    assert tracked(None, np.array([0, 3, 2, 1])).keys() == {"events"}


def test_a_window_forgets() -> None:
    now = [0.0]
    window = Window(bins=2, now_s=lambda: now[0])
    window.add(np.array([1, 2]))
    now[0] = WINDOW_S / 2
    window.add(np.array([10, 20]))
    assert window.total().tolist() == [11, 22]
    now[0] = WINDOW_S + 1
    assert window.total().tolist() == [10, 20]
    now[0] = 2 * WINDOW_S
    assert window.total().tolist() == [0, 0]


def test_what_cannot_be_watched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(monitor, "_places", lambda: [tmp_path])
    with pytest.raises(MonitorError, match="no Ray cluster runs on this machine"):
        monitor.find()
    with pytest.raises(MonitorError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:1"):
        monitor.find(dashboard="http://127.0.0.1:1")
    gone = tmp_path / monitor.DISCOVERY
    gone.write_text('[{"labels": {}, "targets": ["127.0.0.1:1"]}]', encoding="utf-8")
    with pytest.raises(MonitorError, match="no node"):
        monitor.find(discovery=gone)
    with pytest.raises(MonitorError, match=r"no Ray dashboard answers at http://\[::1"):
        monitor.find(dashboard="http://[::1")
    for targets in (",", " ", "a:1,", "a:1,,b:2"):
        with pytest.raises(MonitorError, match="one of them is empty; give HOST:PORT"):
            monitor.find(targets=targets)
    assert monitor.find(targets="a:1, b:2") == {"static_configs": [{"targets": ["a:1", "b:2"]}]}
    monkeypatch.setenv("PATH", str(tmp_path))
    config = monitor.MonitorConfig(discovery={}, folder=tmp_path)
    with pytest.raises(MonitorError, match="apt-get install prometheus"), monitor.prometheus(config):
        pass


def test_the_one_cluster_of_this_machine_is_found_and_several_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
    monkeypatch.setattr(monitor, "_places", lambda: [tmp_path])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for name, target in (("ray", 1), ("er-1", port)):
            (tmp_path / name).mkdir()
            text = json.dumps([{"labels": {}, "targets": [f"127.0.0.1:{target}"]}])
            (tmp_path / name / monitor.DISCOVERY).write_text(text, encoding="utf-8")
        found = monitor.find()
        assert found == {"file_sd_configs": [{"files": [str(tmp_path / "er-1" / monitor.DISCOVERY)]}]}
        shutil.copytree(tmp_path / "er-1", tmp_path / "er-2")
        with pytest.raises(MonitorError, match=r"--discovery, of: .*er-1.*er-2"):
            monitor.find()


GRAFANA = """
import http.server, pathlib, sys
port = next(int(word.rpartition("=")[2]) for word in sys.argv if word.startswith("cfg:server.http_port="))
pathlib.Path(sys.argv[0]).with_suffix(".words").write_text("\\n".join(sys.argv[1:]))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def test_grafana_gets_our_dashboard_and_prometheus(tmp_path: Path) -> None:
    """A program in Grafana's place, which is seldom installed: what it is told, and that it ends."""
    program, port = tmp_path / "grafana-server", free_port()
    program.write_text(f"#!{sys.executable}\n{GRAFANA}", encoding="utf-8")
    program.chmod(0o755)
    config = monitor.MonitorConfig(discovery={}, folder=tmp_path / "watched", port=9_099)
    files.write(config.folder)
    with monitor.grafana(str(program), config, port) as url:
        assert httpx.get(url, trust_env=False).is_success
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    words = (tmp_path / "grafana-server.words").read_text(encoding="utf-8").splitlines()
    provisioning = next(Path(word.partition("=")[2]) for word in words if "paths.provisioning=" in word)
    told = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))
    assert told["datasources"][0]["url"] == "http://127.0.0.1:9099"
    folder = yaml.safe_load((provisioning / "dashboards" / "elasticrec.yml").read_text(encoding="utf-8"))
    (shown,) = Path(folder["providers"][0]["options"]["path"]).iterdir()
    assert json.loads(shown.read_text(encoding="utf-8"))["uid"] == url.rpartition("/")[2]
