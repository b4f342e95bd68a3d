"""The manifests in deploy/kubernetes."""

from __future__ import annotations

from typing import Any

import yaml

from tests.kit.places import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"


def documents() -> list[dict[str, Any]]:
    return [
        document
        for path in sorted(FOLDER.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


def find(kind: str, name: str) -> dict[str, Any]:
    (found,) = [item for item in documents() if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(only)
