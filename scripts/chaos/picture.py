"""Throughput over time with the faults marked, as SVG. Written by hand: no library is needed for bars and lines."""

from __future__ import annotations

from html import escape
from typing import Final

from .evidence import Evidence

WIDTH, LEFT, RIGHT, TOP = 1200, 150, 20, 30
CHART: Final = 220
"""Height of the curve in pixels."""

ROW: Final = 14
BUCKETS: Final = 240
"""At most so many points of the curve; each is a second or more."""


def picture(evidence: Evidence, title: str) -> str:
    """One SVG document: outputs and ends per second, and below them a line for each kind of fault."""
    duration = max(1.0, evidence.ended - evidence.began)
    size = max(1.0, duration / BUCKETS)
    number = int(duration / size) + 1
    outputs, ends = [0.0] * number, [0.0] * number
    for seen in evidence.seen.values():
        for at, _, _ in seen.outputs:
            _count(outputs, at - evidence.began, size)
        for end in seen.ends:
            _count(ends, end["at"] - evidence.began, size)
    height = TOP + CHART + 40 + ROW * len(evidence.enabled) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{escape(title)}</text>',
    ]
    parts += _curve(outputs, size, duration, "#1f77b4", "outputs/s", 0)
    parts += _curve(ends, size, duration, "#2ca02c", "requests ended/s", 1)
    parts += _axis(duration)
    for row, kind in enumerate(evidence.enabled):
        y = TOP + CHART + 40 + ROW * row
        parts.append(f'<text x="{LEFT - 6}" y="{y + 9}" text-anchor="end">{escape(kind)}</text>')
        parts.append(f'<line x1="{LEFT}" y1="{y + 5}" x2="{WIDTH - RIGHT}" y2="{y + 5}" stroke="#eee"/>')
        for fired in evidence.fired:
            if fired.kind == kind:
                x, until = _x(fired.at - evidence.began, duration), _x(fired.healed - evidence.began, duration)
                parts.append(
                    f'<rect x="{x:.1f}" y="{y + 1}" width="{max(2.0, until - x):.1f}" height="8" '
                    'fill="#d62728" opacity="0.7"/>'
                )
    parts.append("</svg>\n")
    return "\n".join(parts)


def _count(buckets: list[float], at: float, size: float) -> None:
    place = int(at / size)
    if 0 <= place < len(buckets):
        buckets[place] += 1 / size


def _x(at: float, duration: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, at / duration))


def _curve(values: list[float], size: float, duration: float, color: str, name: str, place: int) -> list[str]:
    """Each curve has a scale of its own, from zero; its highest value is written beside its name."""
    most = max(values) or 1.0
    points = " ".join(
        f"{_x((index + 0.5) * size, duration):.1f},{TOP + CHART * (1 - value / most):.1f}"
        for index, value in enumerate(values)
    )
    y = TOP + 14 + 16 * place
    return [
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>',
        f'<text x="{LEFT - 6}" y="{y}" text-anchor="end" fill="{color}">{name}</text>',
        f'<text x="{LEFT - 6}" y="{y + 32}" text-anchor="end" fill="{color}">≤ {most:.0f}</text>',
    ]


def _axis(duration: float) -> list[str]:
    step = next((step for step in (5, 10, 30, 60, 120, 300, 600) if duration / step <= 20), 1800)
    parts = [f'<line x1="{LEFT}" y1="{TOP + CHART}" x2="{WIDTH - RIGHT}" y2="{TOP + CHART}" stroke="black"/>']
    for second in range(0, int(duration) + 1, step):
        x = _x(second, duration)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + CHART}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + CHART + 16}" text-anchor="middle">{second} s</text>')
    return parts
