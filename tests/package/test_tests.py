"""The tests' own house: they stand as the package does, and share only what is in ``kit``."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.kit.places import ROOT, TASKS, TESTS

PACKAGE = ("protocol", "producer", "workers", "recovery", "scripts")
OF_ITS_OWN = {
    Path("protocol", "model"),
    *(Path(name) for name in ("deploy", "docs", "kit", "package", "system")),
}
"""Folders with another counterpart than a folder of modules: the Lua scripts, docs/model, files beside the package."""
MOST = 16
LONGEST = 59


def modules() -> list[Path]:
    """Test modules and what they share; not what the processes that they start import."""
    started = [TASKS, *(TESTS / name for name in ("crash_hooks", "fake_nvml", "django_site"))]
    return [path for path in TESTS.rglob("*.py") if not any(path.is_relative_to(folder) for folder in started)]


def imported(source: str) -> set[str]:
    """Modules of the tests that a module names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module or ''}.{item.name}" for item in node.names)}
        elif isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
    return found


def borrowed(source: str) -> list[str]:
    """Test modules, and conftest files, that a module imports."""
    return sorted(
        name
        for name in imported(source)
        if any(part.startswith("test_") or part == "conftest" for part in name.split("."))
    )


def long_names(source: str) -> list[str]:
    tests = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [node.name for node in tests if node.name.startswith("test_") and len(node.name) > LONGEST]


def test_each_folder_of_tests_has_its_folder_in_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in modules() if path.name.startswith("test_")}
    mirrored = {folder for folder in folders if folder.parts[0] in PACKAGE and (ROOT / folder).is_dir()}
    assert folders - mirrored - OF_ITS_OWN == set()


def test_no_folder_of_tests_is_a_heap() -> None:
    assert {
        str(folder): number for folder, number in Counter(path.parent for path in modules()).items() if number > MOST
    } == {}


def test_nothing_is_imported_from_a_test() -> None:
    assert {str(path): names for path in modules() if (names := borrowed(path.read_text(encoding="utf-8")))} == {}


def test_names_of_tests_are_short() -> None:
    assert {str(path): names for path in modules() if (names := long_names(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tests.workers.test_a import x", ["tests.workers.test_a", "tests.workers.test_a.x"]),
        ("def f():\n    from .test_a import x", ["test_a", "test_a.x"]),
        ("from tests.workers import test_a", ["tests.workers.test_a"]),
        ("import tests.workers.test_a", ["tests.workers.test_a"]),
        ("from tests.scripts.conftest import x", ["tests.scripts.conftest", "tests.scripts.conftest.x"]),
        ("from tests.kit.lab import Lab", []),
    ],
)
def test_an_import_from_a_test_is_seen(source: str, found: list[str]) -> None:
    assert borrowed(source) == found


def test_a_long_name_is_seen() -> None:
    assert long_names(f"class A:\n    async def test_{'a' * 55}(self): ...\ndef test_{'a' * 54}(): ...") == [
        f"test_{'a' * 55}"
    ]
