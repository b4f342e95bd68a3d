"""The floors of the house: no folder of the package is a heap of files, and no file one of lines."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.places import ROOT

FOLDERS = ("protocol", "producer", "workers", "recovery", "scripts")
MOST = {".py": 16, ".lua": 24}
"""Files of one kind that may lie side by side. Of Lua's, each transition is one, and there are as many as there are."""

LONGEST = 350
"""Lines that a file of Python may have; one with more has more than one reason to change."""

WIDEST = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["line-length"]


def sources(root: Path, suffix: str = ".py") -> Iterator[Path]:
    """The files of the product that are below ``root``."""
    for folder in (*FOLDERS, "src", "docs"):
        yield from (path for path in (root / folder).rglob(f"*{suffix}") if "__pycache__" not in path.parts)


def long_files(root: Path) -> dict[str, int]:
    """Files below ``root`` with more lines than that, and how many."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)}
    return {str(path.relative_to(root)): number for path, number in lines.items() if number > LONGEST}


def crowded(root: Path) -> dict[str, int]:
    """Folders below ``root`` with more files of a kind than that, and how many."""
    found = Counter(
        (str(path.parent.relative_to(root)), path.suffix)
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in MOST and "__pycache__" not in path.parts
    )
    return {folder: number for (folder, suffix), number in found.items() if number > MOST[suffix]}


def test_no_folder_is_a_heap() -> None:
    assert crowded(ROOT) == {}


@pytest.mark.parametrize(("suffix", "number"), MOST.items())
def test_a_heap_is_seen(tmp_path: Path, suffix: str, number: int) -> None:
    (tmp_path / "workers" / "new").mkdir(parents=True)
    for n in range(number + 1):
        assert crowded(tmp_path) == {}
        (tmp_path / "workers" / "new" / f"{n}{suffix}").touch()
    assert crowded(tmp_path) == {"workers/new": number + 1}


def test_every_folder_says_what_it_is_for() -> None:
    """In one sentence at the top of its ``__init__``."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            assert path.read_text(encoding="utf-8").startswith('"""'), path


def test_no_file_is_a_heap() -> None:
    assert len(list(sources(ROOT))) > 200
    assert long_files(ROOT) == {}


def test_a_long_file_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "docs" / "long.py"
    file.parent.mkdir()
    file.write_text("#\n" * LONGEST, encoding="utf-8")
    assert long_files(tmp_path) == {}
    file.write_text("#\n" * (LONGEST + 1), encoding="utf-8")
    assert long_files(tmp_path) == {"docs/long.py": LONGEST + 1}


def classes(root: Path) -> dict[str, list[str]]:
    """Name of a class -> the modules below ``root`` that define one of this name."""
    found: dict[str, list[str]] = {}
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(str(path.relative_to(root)))
    return found


def test_a_class_name_has_one_meaning() -> None:
    found = classes(ROOT)
    assert len(found) > 200
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def wide_lines(root: Path) -> list[str]:
    """Lines of Lua below ``root`` that are longer than Python's may be, for which ruff sees to it."""
    return [
        f"{path.relative_to(root)}:{number}"
        for path in sources(root, ".lua")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDEST
    ]


def test_no_line_of_lua_is_too_long(tmp_path: Path) -> None:
    assert wide_lines(ROOT) == []
    file = tmp_path / "protocol" / "wide.lua"
    file.parent.mkdir()
    file.write_text("-" * WIDEST + "\n" + "-" * (WIDEST + 1) + "\n", encoding="utf-8")
    assert wide_lines(tmp_path) == ["protocol/wide.lua:2"]
