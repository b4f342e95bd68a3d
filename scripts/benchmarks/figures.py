"""Figures of repeated measurements: medians, percentiles, and rounds that alternate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least ``part`` (0 to 1) of all do not exceed; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what was measured; ``None`` if nothing was."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.median(known) if known else None


def ratio(value: float | None, other: float | None) -> float | None:
    """How many times ``other`` a value is; ``None`` where one of them is missing."""
    return value / other if value is not None and other else None


@dataclass
class Series:
    """What the rounds have given for each subject: subject -> figure -> one value a round."""

    rounds: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    def add(self, subject: str, found: Mapping[str, float | None]) -> None:
        """Keep the figures of one round."""
        figures = self.rounds.setdefault(subject, {})
        for name, value in found.items():
            figures.setdefault(name, []).append(value)

    def medians(self) -> dict[str, dict[str, float | None]]:
        """Subject -> figure -> its median over the rounds."""
        return {
            subject: {name: median(values) for name, values in figures.items()}
            for subject, figures in self.rounds.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Medians, and the rounds that they were taken from."""
        return {"medians": self.medians(), "rounds": self.rounds}
