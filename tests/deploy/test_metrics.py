"""What is deployed beside the metrics: every query of dashboard and alert rules asks for what is really served."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.telemetry.measures import MEASURES
from perdure.scripts.cli.metrics import PORT, metrics
from perdure.scripts.present.exposition import METRICS
from tests.kit.lab import eventually
from tests.kit.places import ROOT
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.scripts.exporter import exporter, get

DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

_SUFFIX = re.compile(r"_(bucket|count|sum)$")
_SELECTOR = re.compile(r"\b((?:perdure|rq)_\w+)\b(\{[^}]*\})?")
_LABEL = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
_BY = re.compile(r"\bby\s*\(([^)]*)\)")


@pytest.fixture(scope="session")
def promtool() -> str:
    """Debian's package ``prometheus`` has it. Missing, it may be skipped by a person, never by CI."""
    found = shutil.which("promtool")
    if found is None and not os.environ.get("CI"):
        pytest.skip("there is no promtool; install Debian's package prometheus")
    assert found, "there is no promtool: .ci/run must install Debian's package prometheus"
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "perdure.json").read_text(encoding="utf-8"))
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Where it stands -> the query."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found[f"variable {variable['name']}"] = variable["query"]["query"]
    return found


QUERIES = queries()


@pytest.mark.parametrize("place", QUERIES)
def test_a_query_asks_for_metrics_and_labels_that_are_served(place: str):
    """A name or label that is not there gives no error in Prometheus, only an empty panel and a silent rule."""
    expression = QUERIES[place]
    selectors = [(match[1], match[2] or "") for match in _SELECTOR.finditer(expression)]
    assert selectors
    known: set[str] = set()
    for name, selector in selectors:
        described = METRICS.get(name) or METRICS.get(_SUFFIX.sub("", name))
        assert described is not None, f"{name} is served by nobody"
        assert (name in METRICS) == (described.kind != "histogram"), f"{name} is no sample of a {described.kind}"
        labels = {*described.labels, *(["le"] if name.endswith("_bucket") else [])}
        known |= labels
        for label, value in _LABEL.findall(selector):
            assert label in labels, f"{name} has no label {label}"
            if label == "reason":
                words = set(re.findall(r"\w+", value))
                assert words <= {*map(str, FailureKind), "LEFT", "RELEASED"}, f"no execution ends with one of {words}"
    for group in _BY.findall(expression):
        assert {label.strip() for label in group.split(",")} <= known, f"by ({group}): one of them is no label"
    # Counters and buckets are read through their growth; a gauge has no rate.
    for name in re.findall(r"(?:rate|increase)\((\w+)", expression):
        kind = (METRICS.get(name) or METRICS[_SUFFIX.sub("", name)]).kind
        assert kind in ("counter", "histogram"), f"{name} is a {kind}"


def test_legends_and_texts_name_labels_that_the_query_keeps():
    for panel in panels():
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), f"{panel['title']}: {{{{{label}}}}}"
    for rule in rules():
        for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
            assert re.search(rf"by \([^)]*\b{label}\b", rule["expr"]) or label == "gpu", rule["alert"]


def test_no_metric_has_a_request_as_a_label():
    """Labels are few, and none has a value for each request."""
    labels = {label for described in METRICS.values() for label in described.labels}
    assert labels == {
        "queue",
        "outcome",
        "reason",
        "priority",
        "state",
        "mode",
        "gpu",
        "what",
        "version",
        "name",
        "queues",
        "status",
    }
    assert all(re.fullmatch(r"(perdure|rq)_[a-z0-9_]+", name) and described.help for name, described in METRICS.items())
    assert len(MEASURES) == sum(described.kind == "histogram" for described in METRICS.values())


def test_the_dashboard_is_one_that_grafana_takes():
    """Distinct ids, panels side by side that do not overlap, each with a description and the data
    source of the page.
    """
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    for panel in panels():
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"


def test_prometheus_takes_configuration_and_rules(promtool: str):
    """And each rule fires at what it is for, and at nothing else."""
    for arguments in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    text = (PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8")
    for rule in rules():
        assert re.search(rf"\b{rule['alert']}\b", text), f"{rule['alert']} is tested by nobody"


def test_the_page_is_one_that_prometheus_takes(promtool: str, redis_url: str):
    """No warning either: names, units and types are as its conventions ask."""
    done = CliRunner().invoke(metrics, ["--once", "--url", redis_url])
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=done.stdout, capture_output=True, text=True, check=False
    )
    complaints = [line for line in (checked.stdout + checked.stderr).splitlines() if not line.startswith("rq_")]
    assert (complaints, checked.returncode in (0, 3)) == ([], True)


def test_the_scrape_configuration_asks_where_the_command_serves():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"metrics:{PORT}"]}]


# --- a real Prometheus -------------------------------------------------------------------------------------


@pytest.fixture
def prometheus(redis_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of one that scrapes a real ``perdure metrics`` every half second, with our rules."""
    binary = shutil.which("prometheus")
    if binary is None and not os.environ.get("CI"):
        pytest.skip("there is no prometheus")
    assert binary, "there is no prometheus: .ci/run must install Debian's package prometheus"
    with exporter(redis_url, tmp_path) as (address, _):
        text = (PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8")
        text = text.replace(f"metrics:{PORT}", address.removeprefix("http://"))
        text = text.replace("15s", "500ms").replace("scrape_timeout: 10s", "scrape_timeout: 500ms")
        (tmp_path / "prometheus.yml").write_text(text, encoding="utf-8")
        shutil.copy(PROMETHEUS / "alerts.yml", tmp_path)
        log = tmp_path / "prometheus.log"
        with socket.socket() as probe:  # it does not say which one it took
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [binary, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
                 f"--web.listen-address=127.0.0.1:{port}"],
                stdout=file, stderr=file,
            )  # fmt: skip
        try:
            eventually(lambda: process.poll() is not None or "ready to receive web requests" in log.read_text())
            assert process.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_every_query_is_answered_by_a_real_prometheus(prometheus: str, connection: Any):
    """Scraped from a pool where everything has happened: all are understood, and each panel's finds something."""
    pool = Pool.over(connection)

    def live() -> None:
        """A little of everything, again and again: rates need growth. What is left of the last time is
        out of the way.
        """
        connection.delete(*(key(name, "gpu") for name in ("queue", "suspects", "retries")), key("isolating"))
        hand = Hand(pool)
        hand.beat()
        names = [f"{hand.incarnation}-{n}" for n in range(4)]
        pool.submit(*names)
        first, second, third, _ = hand.claim(4).claims
        hand.step(third, ["x"])
        hand.finish(first, outputs=["x", "y"])
        hand.fail(second, FailureKind.INVALID_REQUEST)
        counts = {
            f"bucket:{name}:inf:{':'.join(['gpu', 'WORKER_LOST'][: len(MEASURES[name].labels)])}".rstrip(":"): 1
            for name in MEASURES
        }
        pool.store.measure(hand.incarnation, 1, counts)
        pool.reap(hand.incarnation)
        pool.sweep()
        other = Hand(pool)
        other.beat()
        other.claim(1)

    def ask(expression: str) -> list[Any]:
        expression = expression.replace("$__rate_interval", "5s").replace("$queue", ".*")
        if expression.startswith("label_values"):
            expression = re.sub(r"label_values\((\w+), (\w+)\)", r"count by (\2) (\1)", expression)
        status, _, text = get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        answer = json.loads(text)
        assert (status, answer["status"]) == (200, "success"), f"{expression}: {answer}"
        found: list[Any] = answer["data"]["result"]
        return found

    def without() -> list[str]:
        live()
        return [place for place, expression in QUERIES.items() if place.startswith("panel") and not ask(expression)]

    eventually(lambda: not without(), timeout=60)
    for place, expression in QUERIES.items():
        ask(expression.partition(" > ")[0] if place.startswith("alert") else expression)
    groups = json.loads(get(f"{prometheus}/api/v1/rules")[2])["data"]["groups"]
    health = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert health == {rule["alert"]: ("ok", "") for rule in rules()}


# --- the page ----------------------------------------------------------------------------------------------


def test_the_page_lists_what_is_served_and_what_fires():
    """With type, labels and sentence, in the same order."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), told)
        for name, kind, labels, told in re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", text, re.MULTILINE)
    ]
    assert rows == [(name, item.kind, item.labels, item.help) for name, item in METRICS.items()]
    alerts = dict(re.findall(r"^\| `(Perdure\w+)` \| `(.*)`.*\|$", text.replace("\\|", "|"), re.MULTILINE))
    assert alerts == {rule["alert"]: " ".join(rule["expr"].split()) for rule in rules()}
