"""The hosted workflow and the templates: what they call is there, and the versions are those that the pages name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.places import ROOT

HOSTED = ROOT / ".github"
FILES = sorted(HOSTED.rglob("*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps() -> list[str]:
    jobs = [job for path in (HOSTED / "workflows").glob("*.yml") for job in read(path)["jobs"].values()]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_yaml(path: Path) -> None:
    assert isinstance(read(path), dict)


def test_what_the_workflows_call_is_there() -> None:
    called = {word for run in steps() for word in re.findall(r"(?<![\w/$.])(?:scripts|\.ci|tests)/[\w/.]+", run)}
    assert {".ci/run", "scripts/test", "scripts/setup"} <= called
    assert [word for word in called if not (ROOT / word).exists()] == []


def test_the_pythons_are_those_that_the_package_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    pythons = [item.rpartition(" ")[2] for item in declared if re.search(r":: 3\.\d+$", item)]
    assert read(HOSTED / "workflows" / "tests.yml")["jobs"]["python"]["strategy"]["matrix"]["python"] == pythons


def test_contributing_names_servers_and_files_that_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    images = read(HOSTED / "workflows" / "tests.yml")["jobs"]["server"]["strategy"]["matrix"]["image"]
    (row,) = [line for line in page.splitlines() if line.startswith("| server |")]
    named = row.split("|")[4]
    for image in images:
        version = re.split("[:-]", image)[1]
        assert re.search(rf"(?<!\d)(?<!\.){re.escape(version)}(?![\d.])", named), image
    mentioned = set(re.findall(r"`((?:tests|docs|scripts|protocol|producer|recovery|workers|src)/[\w/.]+)`", page))
    assert len(mentioned) > 20
    assert [name for name in mentioned if not (ROOT / name).exists()] == []
