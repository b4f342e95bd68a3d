"""Tables of figures, for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; the first column is text, the others are figures. ``None`` is shown as a dash."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default=())

    def text(self) -> str:
        """For a terminal, in columns."""
        cells = [list(self.heads), *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.heads))]
        lines = [self.title]
        for row in cells:
            first = row[0].ljust(widths[0])
            lines.append(
                "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)]) + "\n"

    def markdown(self) -> str:
        """For the documentation."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.heads)} |"]
        lines.append("|---|" + "---:|" * (len(self.heads) - 1))
        lines += [f"| {' | '.join(shown(cell) for cell in row)} |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def shown(cell: Cell) -> str:
    """A figure with three digits that matter; larger ones whole, with separators."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"
