"""Pictures of figures as SVG, by matplotlib: bars, and points and lines over two axes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tables import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN, OTHERS = "#1f77b4", "#9aa5b1"


@dataclass(frozen=True, slots=True)
class Curve:
    """Points ``(x, y)`` under one name: joined, or as marks when ``marks`` is set."""

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def sheet(title: str, note: str, inches: float) -> tuple[Figure, Axes]:
    """An empty picture, 9 inches wide and so many high; matplotlib is loaded with the first one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, inches), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(note, loc="left", fontsize=8, color="#666")
    figure.suptitle(title, x=0.01, ha="left")
    return figure, axes


def document(figure: Figure) -> str:
    """The picture as SVG: text stays text, and the same figures give the same bytes."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "perdure", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def bars(
    title: str, unit: str, values: Sequence[tuple[str, float | None]], note: str = "", own: str = "perdure"
) -> str:
    """One bar for each value, on a scale from zero; names that begin with ``own`` stand out."""
    figure, axes = sheet(title, f"{unit}  ·  {note}" if note else unit, 1 + 0.28 * len(values))
    names = [name for name, _ in values]
    colors = [OWN if name.startswith(own) else OTHERS for name in names]
    drawn = axes.barh(range(len(names)), [value or 0.0 for _, value in values], color=colors)
    axes.bar_label(drawn, labels=[shown(value) for _, value in values], padding=4)
    axes.set_yticks(range(len(names)), labels=[name.replace("$", r"\$") for name in names])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return document(figure)


def curves(
    title: str,
    across: str,
    up: str,
    lines: Sequence[Curve],
    *,
    log_x: bool = False,
    log_y: bool = False,
    note: str = "",
) -> str:
    """Lines and points over two axes; a logarithmic one leaves out what is not above zero."""
    figure, axes = sheet(title, note, 4.5)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    for line in lines:
        known = [point for point in line.points if _fits(point, log_x, log_y)]
        points, joined = ("o", "none") if line.marks else ("none", "-")
        axes.plot([x for x, _ in known], [y for _, y in known], label=line.name, marker=points, linestyle=joined)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(color="#eee")
    if lines:
        figure.legend(loc="outside right center", frameon=False)
    return document(figure)


def _fits(point: tuple[float, float], log_x: bool, log_y: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and not (log_x and x <= 0) and not (log_y and y <= 0)
