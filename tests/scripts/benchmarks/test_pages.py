"""The figures of the documentation: made from what was measured, and again the same."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from perdure.scripts.benchmarks.command import command_line
from perdure.scripts.benchmarks.pages import PAGES, TABLES, keep, marks, pictures, refill
from tests.kit.docs.pages import blocks
from tests.kit.places import ROOT


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_what_the_measurements_give(name: str) -> None:
    """Nobody has edited one by hand, and no measurement is newer than its page."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert marks(text)
    assert refill(text, ROOT / "docs") == text, f"{name}: run scripts/bench PART --docs docs, or refill_pages()"


def test_every_part_has_its_place() -> None:
    """On the page of performance, once; and the measurements are of parts that there are."""
    assert sorted(marks((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))) == sorted(TABLES)
    assert {path.stem for path in (ROOT / "docs" / "measurements").glob("*.json")} <= set(TABLES)


def test_the_commands_of_the_page_are_taken() -> None:
    """Their options are there; that the parts work is seen in their smoke form
    (tests/scripts/benchmarks/test_bench.py).
    """
    (block,) = blocks(ROOT / "docs" / "performance.md")
    lines = [shlex.split(line.removeprefix("$ ")) for line in block.text.splitlines()]
    assert len(lines) == 3
    for command, *words in lines:
        assert command == "scripts/bench"
        command_line().parse_args(words)


def test_the_pictures_are_what_the_measurements_give() -> None:
    """All that the page shows of the parts, and as it was drawn."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    drawn = pictures(ROOT / "docs")
    assert {Path(name).name for name in re.findall(r"\]\((images/[^)]+)\)", text)} <= set(drawn)
    for name, picture in drawn.items():
        assert (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") == picture, f"{name}: run refill_pages()"


def test_another_figure_makes_another_table(tmp_path: Path) -> None:
    """What is kept is what is shown; a part that was not measured says so; an unknown one is refused."""
    page = "# A page\n\n<!-- bench: recovery -->\nold\n<!-- bench end -->\nrest\n"
    assert "Not measured yet." in refill(page, tmp_path)
    found = {
        "medians": {"perdure: worker": {"kills": 3, "p50_ms": 71.0, "p99_ms": 99, "repeated": 2, "repeated_most": 4}},
        "sizes": {"at": 100, "around": 10}, "systems": {}, "problems": {}, "seconds": 61.0,
    }  # fmt: skip
    machine = {"cpu": "one", "cores": 2, "python": "3", "packages": {}, "date": "today", "load": 0.1}
    keep(tmp_path, "recovery", machine, found)
    made = refill(page, tmp_path)
    assert "| perdure: worker | 3 | 71 | 99 | 2 | 4 |" in made
    assert "old" not in made
    assert made.endswith("rest\n")
    assert json.loads((tmp_path / "measurements" / "recovery.json").read_text())["machine"]["cores"] == 2
    headline = refill(page.replace("recovery", "headline"), tmp_path)
    assert "| `kill -9` of a worker → next step elsewhere, p50 | 71 ms |  |" in headline
    with pytest.raises(KeyError):
        refill(page.replace("recovery", "nothing"), tmp_path)
