"""The documentation's figures: what was measured is kept as JSON, and the tables and pictures are made from it.

``docs/measurements/PART.json`` holds what one run of a part has found, with the machine and the date. Whatever stands
between ``<!-- bench: NAME -->`` and ``<!-- bench end -->`` in a page is made from these files: NAME is a part, or
``headline`` for what the README says of all of them. ``docs/images`` has the pictures. A test makes all of it again
and compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from .curves import engine_pictures, engine_tables, goodput_pictures, goodput_tables
from .machine import one_line
from .reports import (
    Pictures,
    checkpoint_pictures,
    checkpoint_tables,
    queue_pictures,
    queue_tables,
    recovery_pictures,
    recovery_tables,
    saturation_tables,
    scale_pictures,
    scale_tables,
    stream_tables,
)
from .tables import Table, shown

TABLES: Final[Mapping[str, Callable[[Mapping[str, Any]], list[Table]]]] = {
    "queue": queue_tables,
    "recovery": recovery_tables,
    "checkpoints": checkpoint_tables,
    "engine": engine_tables,
    "goodput": goodput_tables,
    "scale": scale_tables,
    "saturation": saturation_tables,
    "streams": stream_tables,
}
"""The tables of each part, from its figures."""

PICTURES: Final[Mapping[str, Callable[[Mapping[str, Any], str], Pictures]]] = {
    "queue": queue_pictures,
    "recovery": recovery_pictures,
    "checkpoints": checkpoint_pictures,
    "engine": engine_pictures,
    "goodput": goodput_pictures,
    "scale": scale_pictures,
}
"""The pictures of each part by their file names, from its figures and the machine in a line."""

FOLDER: Final = "measurements"
PAGES: Final = ("docs/performance.md", "README.md")

_MARKED = re.compile(r"(<!-- bench: (\w+) -->\n)(.*?)(<!-- bench end -->)", re.DOTALL)


def keep(docs: Path, part: str, machine: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write what a part has found to ``docs/measurements/PART.json``."""
    folder = docs / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "figures": figures}
    text = json.dumps(found, indent=1, allow_nan=False, default=str)
    (folder / f"{part}.json").write_text(f"{text}\n", encoding="utf-8")


def refill(text: str, docs: Path) -> str:
    """A page with all that is marked in it made again. Raises ``KeyError`` for a mark that names no part."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}{_content(match[2], docs)}{match[4]}"

    return _MARKED.sub(made, text)


def pictures_of(part: str, figures: Mapping[str, Any], machine: Mapping[str, Any]) -> Pictures:
    """The pictures of one part; not every part has some."""
    return PICTURES[part](figures, one_line(dict(machine))) if part in PICTURES else {}


def pictures(docs: Path) -> Pictures:
    """What ``docs/images`` holds of the parts that were measured."""
    drawn: Pictures = {}
    for part in PICTURES:
        if (kept := _read(docs, part)) is not None:
            drawn |= pictures_of(part, kept["figures"], kept["machine"])
    return drawn


def refill_pages(root: Path) -> None:
    """Make the marked parts of all pages again, and the pictures."""
    for name, text in pictures(root / "docs").items():
        (root / "docs" / "images" / name).write_text(text, encoding="utf-8")
    for name in PAGES:
        path = root / name
        path.write_text(refill(path.read_text(encoding="utf-8"), root / "docs"), encoding="utf-8")


def marks(text: str) -> list[str]:
    """The names of what is marked in a page."""
    return [match[2] for match in _MARKED.finditer(text)]


def _read(docs: Path, part: str) -> dict[str, Any] | None:
    path = docs / FOLDER / f"{part}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _content(name: str, docs: Path) -> str:
    if name == "headline":
        return headline(docs)
    tables = TABLES[name]
    found = _read(docs, name)
    if found is None:
        return "Not measured yet.\n"
    minutes = found["figures"]["seconds"] / 60
    texts = [table.markdown() for table in tables(found["figures"])]
    return "\n".join([f"{one_line(found['machine'])}; it took {minutes:.0f} min.\n", *texts])


def headline(docs: Path) -> str:
    """What a reader of the README wants to know first; rows of parts that were not measured are left out."""
    rows: list[list[str]] = []
    if (queue := _read(docs, "queue")) is not None:
        rows += _of_the_queue(queue["figures"])
    if (recovery := _read(docs, "recovery")) is not None:
        medians = recovery["figures"]["medians"]
        others = ", ".join(
            f"{name} {shown(row['p50_ms'])} ms, {shown(row['repeated'])} steps again"
            for name, row in medians.items()
            if not name.startswith("perdure")
        )
        rows += [
            [f"{text} → next step elsewhere, p50", f"{shown(medians[name]['p50_ms'])} ms", beside]
            for name, text, beside in (
                ("perdure: worker", "`kill -9` of a worker", f"at their fastest: {others}" if others else ""),
                ("perdure: tree", "`kill -9` of a worker with its guardian", ""),
                ("perdure: tree (0.5 s)", "the same with a heartbeat timeout of 0.5 s", ""),
            )
            if name in medians
        ]
    for part, name, text, unit in (
        (
            "checkpoints",
            "checkpoints_100_ms__in_turn",
            "tokens/s with checkpoints at the default interval, against none",
            "×",
        ),
        ("engine", "engine_decode_exact_batch_8", "decode of 8 requests at once, exact, against transformers", "×"),
        ("scale", "sweep_nothing_expired_redis_us", "a sweep with nothing expired, Redis time", " µs"),
    ):
        found = _read(docs, part)
        value = None if found is None else found["figures"]["ratios"].get(name)
        if value is not None:
            rows.append([text, f"{shown(value)}{unit}", ""])
    if not rows:
        return "Not measured yet.\n"
    lines = ["| | Perdure | beside |", "|---|---:|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _of_the_queue(figures: Mapping[str, Any]) -> list[list[str]]:
    medians = figures["medians"]
    own = medians["perdure"]
    peers = {name: row for name, row in medians.items() if not name.startswith(("perdure", "bare"))}

    def beside(figure: str, unit: str = "", *, least: bool = False) -> str:
        known = [(name, row[figure]) for name, row in peers.items() if row.get(figure) is not None]
        chosen = sorted(known, key=lambda item: item[1] if least else -item[1])[:2]
        rq = [item for item in known if item[0] == "rq SimpleWorker" and item not in chosen]
        return ", ".join(f"{name} {shown(value)}{unit}" for name, value in [*chosen, *rq])

    return [
        ["no-op requests drained by one worker process", f"{shown(own['drain_1'])}/s", beside("drain_1", "/s")],
        ["bulk submit", f"{shown(own['bulk'])}/s", beside("bulk", "/s")],
        [
            "Redis' memory of a waiting request",
            f"{shown(own['bytes_queued'])} B",
            beside("bytes_queued", " B", least=True),
        ],
    ]
