"""A timeline as SVG: lanes are workers, bars are executions, ticks are checkpoints, a red cross is a kill.

Plain text, no library: one file that a browser, a README and a bug report show alike, light or dark as the reader's
system is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

WIDTH, RIGHT, TOP = 960, 24, 54
LEFT_MOST, LETTER = 260, 7.2
"""Most that the names of lanes may take, and the width of one letter of them."""
ROW, GAP, PAD = 14, 3, 7
COLORS: Final = 12
TICKS_MOST: Final = 2000

Position = Callable[[float], float]

STYLE = """
svg { font: 12px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
.ground { fill: #ffffff; } .text { fill: #1f2328; } .dim { fill: #59636e; } .lane { fill: #f6f8fa; }
.grid { stroke: #d1d9e0; } .tick { stroke: #1f2328; stroke-opacity: .55; } .cross { stroke: #d1242f; stroke-width: 3; }
.kill { stroke: #d1242f; stroke-dasharray: 4 3; }
.red { fill: #d1242f; font-weight: 600; paint-order: stroke; stroke: #f6f8fa; stroke-width: 4; }
.link { stroke: #59636e; fill: none; stroke-dasharray: 2 3; } .waiting { fill: #d1d9e0; }
.bar { stroke-width: 1; } .lost { fill-opacity: .45; } .inside { fill: #1f2328; font-size: 10px; }
@media (prefers-color-scheme: dark) {
.ground { fill: #0d1117; } .text { fill: #f0f6fc; } .dim { fill: #9198a1; } .lane { fill: #151b23; }
.grid { stroke: #3d444d; } .tick { stroke: #f0f6fc; } .cross { stroke: #ff6a69; } .kill { stroke: #ff6a69; }
.red { fill: #ff6a69; stroke: #151b23; } .link { stroke: #9198a1; } .waiting { fill: #3d444d; }
.inside { fill: #f0f6fc; }
}
"""


@dataclass(eq=False, slots=True, kw_only=True)
class Bar:
    """One execution, or a wait. Times in seconds, all on one clock; ``color`` tells requests apart.

    ``shape`` is running, finished, failed, lost, ended or waiting; ``title`` is shown under the mouse.
    """

    lane: str
    begin: float
    end: float
    shape: str
    title: str = ""
    label: str = ""
    color: int = 0
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cross:
    """A worker that was lost; with ``line``, a dashed line through all lanes says that this was a kill."""

    at: float
    lane: str
    text: str
    title: str = ""
    line: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """Where a request went on."""

    before: Bar
    after: Bar


@dataclass(slots=True, kw_only=True)
class Chart:
    """What is drawn, from ``origin`` to ``end``. Lanes stand in the order in which bars first name them."""

    title: str
    subtitle: str
    origin: float
    end: float
    bars: list[Bar] = field(default_factory=list)
    crosses: list[Cross] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


@dataclass(slots=True)
class _Lane:
    top: float = 0.0
    rows: list[float] = field(default_factory=list)  # the end of the last bar of each row
    places: dict[int, int] = field(default_factory=dict)  # id of a bar -> its row

    @property
    def height(self) -> float:
        return len(self.rows) * (ROW + GAP) - GAP + 2 * PAD


def draw(chart: Chart) -> str:
    """The chart as an SVG document."""
    lanes = _lanes(chart)
    longest = max((len(name) for name in lanes), default=0)
    left = min(LEFT_MOST, 24 + longest * LETTER)
    span = max(chart.end - chart.origin, 1e-3)
    scale = (WIDTH - left - RIGHT) / span

    def x(at: float) -> float:
        return left + (min(max(at, chart.origin), chart.end) - chart.origin) * scale

    bottom = TOP + sum(lane.height + GAP for lane in lanes.values())
    height = bottom + 54
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img">',
        f"<title>{_text(chart.title)}</title>",
        f"<style>{STYLE}{_palette()}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height:.0f}"/>',
        f'<text class="text" x="12" y="22" font-size="15" font-weight="600">{_text(chart.title)}</text>',
        f'<text class="dim" x="12" y="40">{_text(chart.subtitle)}</text>',
    ]
    parts += _grid(chart, lanes, left, bottom, x, span)
    parts += [_link(link, lanes, x) for link in chart.links]
    for bar in chart.bars:
        parts += _bar(bar, _y(bar, lanes), x)
    for cross in chart.crosses:
        parts += _cross(cross, lanes, bottom, x)
    parts += _legend(chart, left, height - 14)
    return "\n".join([*parts, "</svg>", ""])


def _lanes(chart: Chart) -> dict[str, _Lane]:
    """Lanes with their bars packed into as few rows as they need."""
    lanes: dict[str, _Lane] = {}
    for bar in sorted(chart.bars, key=lambda bar: (bar.begin, bar.color)):
        lane = lanes.setdefault(bar.lane, _Lane())
        row = next((number for number, end in enumerate(lane.rows) if end <= bar.begin), len(lane.rows))
        if row == len(lane.rows):
            lane.rows.append(bar.end)
        lane.rows[row] = bar.end
        lane.places[id(bar)] = row
    top = float(TOP)
    for lane in lanes.values():
        lane.top = top
        top += lane.height + GAP
    return lanes


def _y(bar: Bar, lanes: dict[str, _Lane]) -> float:
    lane = lanes[bar.lane]
    return lane.top + PAD + lane.places[id(bar)] * (ROW + GAP)


def _grid(chart: Chart, lanes: dict[str, _Lane], left: float, bottom: float, x: Position, span: float) -> Iterable[str]:
    for name, lane in lanes.items():
        width = WIDTH - left - RIGHT
        yield f'<rect class="lane" x="{left:.1f}" y="{lane.top:.1f}" width="{width:.1f}" height="{lane.height:.1f}"/>'
        shown = name if len(name) * LETTER <= LEFT_MOST - 24 else name[: int((LEFT_MOST - 24) / LETTER) - 1] + "…"
        yield f'<text class="text" x="12" y="{lane.top + lane.height / 2 + 4:.1f}">{_text(shown)}</text>'
    step = step_of(span)
    digits = 0 if step >= 1 else 1 if step >= 0.1 else 3
    for number in range(int(span / step) + 1):
        at = chart.origin + number * step
        yield f'<line class="grid" x1="{x(at):.1f}" y1="{TOP}" x2="{x(at):.1f}" y2="{bottom:.1f}"/>'
        second = f"{number * step:.{digits}f} s"
        yield f'<text class="dim" x="{x(at):.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{second}</text>'


def step_of(span: float) -> float:
    """The distance of two lines of the grid: 1, 2 or 5 times a power of ten, at most 12 of them."""
    step = 0.001
    while True:
        for factor in (1, 2, 5):
            if span / (step * factor) <= 12:
                return step * factor
        step *= 10


def _bar(bar: Bar, y: float, x: Position) -> Iterable[str]:
    width = max(1.5, x(bar.end) - x(bar.begin))
    kind = "waiting" if bar.shape == "waiting" else f"bar c{bar.color % COLORS} {bar.shape}"
    title = f"<title>{_text(bar.title)}</title>" if bar.title else ""
    thin = ROW / 2 - 2 if bar.shape == "waiting" else 0.0
    yield (
        f'<rect class="{kind}" x="{x(bar.begin):.1f}" y="{y + thin:.1f}" width="{width:.1f}" '
        f'height="{ROW - 2 * thin:.1f}" rx="2">{title}</rect>'
    )
    marks = "".join(f"M{x(at):.1f} {y:.1f}v{ROW}" for at in _thinned(bar.ticks))
    if marks:
        yield f'<path class="tick" d="{marks}"/>'
    if bar.label and width > 8 + 6.2 * len(bar.label):
        yield f'<text class="inside" x="{x(bar.begin) + 4:.1f}" y="{y + ROW - 3:.1f}">{_text(bar.label)}</text>'
    if bar.shape == "running":
        yield f'<text class="dim" x="{x(bar.end) - 2:.1f}" y="{y + ROW - 3:.1f}" text-anchor="end">runs</text>'


def _thinned(ticks: tuple[float, ...]) -> tuple[float, ...]:
    return ticks[:: len(ticks) // TICKS_MOST + 1]


def _link(link: Link, lanes: dict[str, _Lane], x: Position) -> str:
    x1, y1 = x(link.before.end), _y(link.before, lanes) + ROW / 2
    x2, y2 = x(link.after.begin), _y(link.after, lanes) + ROW / 2
    bend = max(10.0, (x2 - x1) / 2)
    curve = f"C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return f'<path class="link" d="M{x1:.1f} {y1:.1f}{curve}"/>'


def _cross(cross: Cross, lanes: dict[str, _Lane], bottom: float, x: Position) -> Iterable[str]:
    lane = lanes.get(cross.lane)
    at, y = x(cross.at), TOP + 8.0 if lane is None else lane.top + lane.height / 2
    if cross.line:
        yield f'<line class="kill" x1="{at:.1f}" y1="{TOP - 4}" x2="{at:.1f}" y2="{bottom:.1f}"/>'
    title = f"<title>{_text(cross.title)}</title>" if cross.title else ""
    yield f'<path class="cross" d="M{at - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12">{title}</path>'
    end = at > WIDTH * 0.72
    place = f'x="{at - 10:.1f}" text-anchor="end"' if end else f'x="{at + 10:.1f}"'
    yield f'<text class="red" {place} y="{y + 4:.1f}">{_text(cross.text)}</text>'


def _legend(chart: Chart, left: float, y: float) -> Iterable[str]:
    shapes = {bar.shape for bar in chart.bars}
    entries: list[tuple[str, str]] = [
        ('<rect class="bar c0" x="{x}" y="{y}" width="18" height="10" rx="2"/>', "execution")
    ]
    if any(bar.ticks for bar in chart.bars):
        entries.append(('<path class="tick" d="M{x} {y}m4 0v10m6 -10v10m6 -10v10"/>', "checkpoint"))
    if chart.crosses:
        entries.append(('<path class="cross" d="M{x} {y}m4 0l10 10m0 -10l-10 10"/>', "worker lost"))
    if chart.links:
        entries.append(('<path class="link" d="M{x} {y}m0 5h18"/>', "goes on elsewhere"))
    if "waiting" in shapes:
        entries.append(('<rect class="waiting" x="{x}" y="{y}" width="18" height="10"/>', "waits"))
    at = left
    for shape, text in entries:
        yield shape.format(x=f"{at:.1f}", y=f"{y - 9:.1f}")
        yield f'<text class="dim" x="{at + 24:.1f}" y="{y:.1f}">{text}</text>'
        at += 40 + 6.6 * len(text)


def _palette() -> str:
    """Twelve hues, neighbours far apart; strong enough on light and on dark ground."""
    rules = []
    for number in range(COLORS):
        hue = (212 + number * 150) % 360
        rules.append(f".c{number} {{ fill: hsl({hue} 62% 72%); stroke: hsl({hue} 45% 45%); }}")
    dark = "".join(f".c{number} {{ fill: hsl({(212 + number * 150) % 360} 40% 38%); }}" for number in range(COLORS))
    return "\n".join(rules) + "\n@media (prefers-color-scheme: dark) { " + dark + " }\n"


def _text(text: str) -> str:
    """Fit for XML: what XML may not hold at all, such as the escape of a terminal, becomes a box."""
    allowed = "".join(
        sign
        if sign in "\t\n" or (sign >= " " and not 0xD800 <= ord(sign) <= 0xDFFF and sign not in "\ufffe\uffff")
        else "▯"
        for sign in text
    )
    return escape(allowed, {'"': "&quot;"})
