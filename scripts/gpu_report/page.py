"""What the steps have found, as a page for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..benchmarks.machine import describe, one_line
from ..benchmarks.tables import Cell, Table, shown
from .runner import StepOutcome

DEVICE: Final = ("device", "driver", "cuda", "memory_gb")
"""Figures of the step ``machine`` that stand in the first line."""


def page(outcomes: Sequence[StepOutcome], device: str, seconds: float) -> str:
    """Markdown: the machine, a row for each step, and its figures."""
    figures: dict[str, Any] = next((item.figures for item in outcomes if item.step == "machine"), {})
    known = [f"{name.replace('_', ' ')} {shown(figures[name])}" for name in DEVICE if name in figures]
    lines = ["# What a GPU shows", "", f"{', '.join([*known, one_line(describe())])}; it took {seconds:.0f} s."]
    if device == "cpu":
        lines += [
            "",
            "**A rehearsal on the CPU, in small: it shows that the steps run, and its figures mean nothing.**",
        ]
    lines += ["", "| step | | seconds | |", "|---|---|---:|---|"]
    for item in outcomes:
        lines.append(f"| {item.title} | {item.state} | {shown(item.seconds)} | {_line(item.reason) or '–'} |")
    if absent := [f"- {item.title}: {what}" for item in outcomes for what in item.missing]:
        lines += ["", "Not rehearsed:", "", *absent]
    for item in outcomes:
        for place, table in enumerate(tables(item)):
            heading = [] if place else ["", f"## {item.title}"]
            lines += [*heading, "", *table.markdown().splitlines()[2:]]
    return "\n".join(lines).rstrip() + "\n"


def tables(outcome: StepOutcome) -> list[Table]:
    """The figures of a step: single ones under each other, and what are mappings as the rows of one table."""
    single: list[Sequence[Cell]] = []
    rows: dict[str, Mapping[str, Cell]] = {}
    for name, value in outcome.figures.items():
        if isinstance(value, Mapping):
            rows[name] = value
        else:
            single.append([name.replace("_", " "), value])
    found = [Table(outcome.title, ["", "figure"], single)] if single else []
    if rows:
        heads = list(dict.fromkeys(head for row in rows.values() for head in row))
        cells: list[Sequence[Cell]] = [[name, *(row.get(head) for head in heads)] for name, row in rows.items()]
        found.append(Table(outcome.title, ["", *(head.replace("_", " ") for head in heads)], cells))
    return found


def _line(text: str) -> str:
    """As it may stand in a table."""
    return " ".join(text.replace("|", "/").split())
