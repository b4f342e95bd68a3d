"""Pictures of figures as SVG. Written by hand: no library is needed for bars, points and lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from .tables import shown

WIDTH: Final = 900
COLORS: Final = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")

_LEFT, _RIGHT, _TOP = 190, 90, 56
_BAR = 22


@dataclass(frozen=True, slots=True)
class Curve:
    """Points ``(x, y)`` under one name: joined, or as marks when ``marks`` is set."""

    name: str
    points: Sequence[tuple[float, float]]
    marks: bool = False


def bars(
    title: str, unit: str, values: Sequence[tuple[str, float | None]], note: str = "", own: str = "perdure"
) -> str:
    """One bar for each value, on a scale from zero; names that begin with ``own`` stand out."""
    most = max((value for _, value in values if value is not None), default=0.0) or 1.0
    height = _TOP + _BAR * len(values) + 20
    parts = _head(title, f"{unit}  ·  {note}" if note else unit, height)
    for place, (name, value) in enumerate(values):
        y = _TOP + _BAR * place
        color = COLORS[0] if name.startswith(own) else "#9aa5b1"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        length = (WIDTH - _LEFT - _RIGHT) * (value or 0.0) / most
        parts.append(f'<rect x="{_LEFT}" y="{y + 3}" width="{length:.1f}" height="{_BAR - 7}" fill="{color}"/>')
        parts.append(f'<text x="{_LEFT + length + 6:.1f}" y="{y + 14}">{shown(value)}</text>')
    return _end(parts)


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
    height, bottom = 420, 370
    points = [point for line in lines for point in line.points if _fits(point, log_x, log_y)]
    if not points:
        points = [(1.0, 1.0)]
    place_x, ticks_x = _scale([x for x, _ in points], log_x, _LEFT, WIDTH - _RIGHT - 90)
    place_y, ticks_y = _scale([y for _, y in points], log_y, bottom, _TOP)
    parts = _head(title, note, height)
    for tick in ticks_x:
        x = place_x(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{shown(tick)}</text>')
    for tick in ticks_y:
        y = place_y(tick)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT - 90}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{shown(tick)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT - 90) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 38}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text x="20" y="{(bottom + _TOP) / 2}">{escape(up)}</text>')
    for number, line in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        known = [(place_x(x), place_y(y)) for x, y in line.points if _fits((x, y), log_x, log_y)]
        if line.marks:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in known]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in known)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        parts.append(
            f'<text x="{WIDTH - _RIGHT - 80}" y="{_TOP + 14 + 18 * number}" fill="{color}">{escape(line.name)}</text>'
        )
    return _end(parts)


def _fits(point: tuple[float, float], log_x: bool, log_y: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and not (log_x and x <= 0) and not (log_y and y <= 0)


def _scale(
    values: Sequence[float], log: bool, begin: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between two pixels, and the values that are written beside the axis."""
    if log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        high = max(high, low + 1)
        ticks = [10.0**power for power in range(low, high + 1)]
        return lambda value: begin + (end - begin) * (math.log10(value) - low) / (high - low), ticks
    most = max(*values, 0.0) or 1.0
    step = 10 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if most / (step * part) <= 10)
    top = math.ceil(most / step) * step
    ticks = [step * number for number in range(round(top / step) + 1)]
    return lambda value: begin + (end - begin) * value / top, ticks


def _head(title: str, second: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="16" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="16" y="40" fill="#666" font-size="11">{escape(second)}</text>',
    ]


def _end(parts: list[str]) -> str:
    return "\n".join([*parts, "</svg>\n"])
