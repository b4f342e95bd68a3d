"""The contracts of pyproject.toml find every way in which an import can be written, in each layer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.places import ROOT

LAYERS = "scripts -> producer, workers -> recovery -> protocol"
CIRCLES = "No circles between the modules of a folder"
ENGINES = "Engines know no Redis"
LIGHT = "Guardians and producers load neither RQ nor an inference library"

Lint = Callable[[], list[str]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, as a folder perdure."""
    copy = tmp_path_factory.mktemp("tree")
    # With its __init__: as a folder without one it would lose to the package that is installed.
    shutil.copytree(ROOT / "src" / "perdure", copy / "perdure", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("protocol", "producer", "workers", "recovery", "scripts"):
        shutil.copytree(ROOT / name, copy / "perdure" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", copy / "pyproject.toml")
    return copy


@pytest.fixture
def broken(tree: Path) -> Lint:
    """Gives the contracts that do not hold there."""

    def lint() -> list[str]:
        # -S: no .pth leads to the package of the checkout.
        code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, "--no-cache", "--no-logo"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "Contracts: " in done.stdout, done.stdout + done.stderr
        found = [line.partition(" BROKEN")[0] for line in done.stdout.splitlines() if " BROKEN" in line]
        assert bool(found) == bool(done.returncode)
        return found

    return lint


@pytest.fixture
def plant(tree: Path) -> Iterator[Callable[[str, str], None]]:
    """Adds a line to a module, until the end of the test."""
    before: dict[Path, str] = {}

    def add(module: str, line: str) -> None:
        file = tree / "perdure" / f"{module}.py"
        before.setdefault(file, file.read_text(encoding="utf-8"))
        file.write_text(f"{before[file]}\n{line}\n", encoding="utf-8")

    yield add
    for file, text in before.items():
        file.write_text(text, encoding="utf-8")


def test_all_contracts_hold_and_a_new_folder_needs_a_layer(tree: Path, broken: Lint) -> None:
    assert broken() == []
    (tree / "perdure" / "other").mkdir()
    (tree / "perdure" / "other" / "__init__.py").write_text("from ..scripts import main\n")
    try:
        assert broken() == [LAYERS]
    finally:
        shutil.rmtree(tree / "perdure" / "other")


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("protocol/states", "from ..recovery.failures import POLICIES", LAYERS),
        ("protocol/states", "def late():\n    from ..workers.tasks import Step", LAYERS),
        ("protocol/states", "if TYPE_CHECKING:\n    from ..producer.client import Client", LAYERS),
        ("recovery/strays", "def late():\n    import perdure.workers.redis_io.pace", LAYERS),
        ("producer/reading/steps", "def late():\n    from ...workers.tasks import path_of", LAYERS),
        ("workers/redis_io/pace", "def late():\n    from ...producer import client", LAYERS),
        ("workers/redis_io/pace", "def late():\n    from ...scripts import main", LAYERS),
        ("workers/tasks/base", "def late():\n    from . import generators", CIRCLES),
        ("protocol/errors", "if TYPE_CHECKING:\n    from .packed_state import PackedState", CIRCLES),
        ("workers/text/bundle", "def late():\n    from .weights.models import read", CIRCLES),
        ("workers/text/noise", "def late():\n    import redis", ENGINES),
        ("workers/text/generation", "def late():\n    from ...protocol.store import Store", ENGINES),
        ("workers/engine/engines", "from ...protocol.scripts import load", ENGINES),
        ("workers/guardian/kin", "def late():\n    import rq.job", LIGHT),
        ("recovery/deaths", "import torch", LIGHT),
        ("protocol/keys", "from rq.job import Job", LIGHT),
    ],
)
def test_what_must_not_be_imported_is_found(
    plant: Callable[[str, str], None], broken: Lint, module: str, line: str, contract: str
) -> None:
    """At the top, in a function, for types only, and through modules between."""
    plant(module, line)
    assert contract in broken()
