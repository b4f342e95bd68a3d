"""Throughput over time with the faults marked, as SVG."""

from __future__ import annotations

from collections.abc import Iterable

from ..benchmarks.drawing import document
from .evidence import Evidence

BUCKETS = 240
"""At most so many points of the curve; each is a second or more."""


def picture(evidence: Evidence, title: str) -> str:
    """One SVG document: outputs and ends per second, and below them a line for each kind of fault."""
    from matplotlib.figure import Figure

    duration = max(1.0, evidence.ended - evidence.began)
    kinds = list(evidence.enabled)
    figure = Figure(figsize=(12, 4 + 0.18 * len(kinds)), layout="constrained")
    rates, faults = figure.subplots(2, sharex=True, height_ratios=[3, max(1.0, 0.18 * len(kinds))])
    figure.suptitle(title, x=0.01, ha="left")
    seen = evidence.seen.values()
    outputs = (at - evidence.began for item in seen for at, _, _ in item.outputs)
    ends = (end["at"] - evidence.began for item in seen for end in item.ends)
    for times, name, color, axes in (
        (outputs, "outputs/s", "#1f77b4", rates),
        (ends, "requests ended/s", "#2ca02c", rates.twinx()),
    ):
        axes.plot(*_rate(times, duration), color=color, linewidth=1)
        axes.set_ylabel(name, color=color)
        axes.set_ylim(bottom=0)
    faults.set_yticks(range(len(kinds)), labels=kinds, fontsize=7)
    faults.set_ylim(len(kinds) - 0.5, -0.5)
    faults.set_xlim(0, duration)
    faults.set_xlabel("s")
    faults.grid(color="#eee")
    for fired in evidence.fired:
        if fired.kind in evidence.enabled:
            # A fault that is over at once is still to be seen.
            lasted = max(duration / 600, fired.healed - fired.at)
            bar = (fired.at - evidence.began, lasted)
            faults.broken_barh([bar], (kinds.index(fired.kind) - 0.35, 0.7), color="#d62728", gid=f"fault-{fired.kind}")
    return document(figure)


def _rate(times: Iterable[float], duration: float) -> tuple[list[float], list[float]]:
    """Middles of equal spans, and how many a second fall into each."""
    size = max(1.0, duration / BUCKETS)
    found = [0.0] * (int(duration / size) + 1)
    for at in times:
        if 0 <= at / size < len(found):
            found[int(at / size)] += 1 / size
    return [(place + 0.5) * size for place in range(len(found))], found
