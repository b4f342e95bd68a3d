"""What scrapes, stores and shows the metrics finds the others where it looks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from perdure.scripts.cli.metrics import PORT
from perdure.scripts.present.exposition import METRICS
from tests.kit.deploy.deployment import compose
from tests.kit.deploy.kubernetes import container, find
from tests.kit.places import ROOT

SERVICES: dict[str, Any] = compose()["services"]
PROVISIONED = ROOT / "deploy" / "monitoring" / "grafana" / "provisioning"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def mounted(service: str, inside: str) -> Path:
    """Where a path inside a container is in this checkout."""
    for volume in SERVICES[service]["volumes"]:
        source, target = volume.split(":")[:2]
        if inside == target or inside.startswith(f"{target}/"):
            return ROOT / str(source) / inside[len(target) :].lstrip("/")
    raise AssertionError(f"{inside} is no volume of {service}")


def test_prometheus_scrapes_the_service_of_that_name():
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["monitoring"]} == {
        "metrics",
        "prometheus",
        "grafana",
    }
    (option, _) = SERVICES["prometheus"]["command"]
    settings = read(mounted("prometheus", option.partition("=")[2]))
    targets = [target for job in settings["scrape_configs"] for c in job["static_configs"] for target in c["targets"]]
    assert targets == [f"metrics:{PORT}"]
    assert "--port" not in SERVICES["metrics"]["command"]
    for rules in settings["rule_files"]:
        assert (ROOT / "deploy" / "prometheus" / rules).is_file()


def test_grafana_finds_prometheus_and_the_dashboard():
    (source,) = read(PROVISIONED / "datasources" / "prometheus.yaml")["datasources"]
    address = urlsplit(source["url"])
    assert source["type"] == "prometheus"
    assert f":{address.port}" in SERVICES[str(address.hostname)]["ports"][0]
    (provider,) = read(PROVISIONED / "dashboards" / "perdure.yaml")["providers"]
    boards = list(mounted("grafana", provider["options"]["path"]).glob("*.json"))
    assert boards
    assert all(json.loads(board.read_text(encoding="utf-8"))["uid"] for board in boards)
    assert mounted("grafana", "/etc/grafana/provisioning") == PROVISIONED


def test_keda_asks_for_metrics_that_are_served():
    (trigger,) = find("ScaledObject", "perdure-worker")["spec"]["triggers"]
    names = re.findall(r"perdure_\w+", trigger["metadata"]["query"])
    assert names
    assert set(names) <= set(METRICS)


def test_kubernetes_serves_them_on_the_same_port():
    (port,) = container(find("Deployment", "perdure-metrics"))["ports"]
    (served,) = find("Service", "perdure-metrics")["spec"]["ports"]
    assert port["containerPort"] == served["port"] == PORT
    assert find("Service", "perdure-metrics")["metadata"]["annotations"]["prometheus.io/port"] == str(PORT)
