"""Tables and pictures of the parts ``engine`` and ``goodput``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .drawing import Curve, bars, curves
from .measures.goodput import from_zero, resumed
from .reports import Pictures, ratio_table
from .tables import Table


def engine_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each batch and way."""
    rows = [
        [name, row["prefill"], row["decode"], found["equal_tokens"].get(name)] for name, row in found["medians"].items()
    ]
    sizes = found["sizes"]
    notes = [
        f"Medians of {sizes['rounds']} rounds; {sizes['model']}, {sizes['dtype']}, {found['threads']} threads, "
        f"prompts of {sizes['prompt']} tokens, {sizes['new']} new ones; "
        f"transformers with {found['attention']} attention.",
        "equal tokens: the part that transformers has put out too, at the same place.",
    ]
    heads = ["", "prefill tokens/s", "decode tokens/s", "equal tokens"]
    return [Table("The engine against transformers' generate", heads, rows, notes), ratio_table(found)]


def engine_pictures(found: Mapping[str, Any], note: str) -> Pictures:
    """Bars: prefill and decode."""
    return {
        f"engine-{figure}.svg": bars(
            f"Tokens/s of {figure}, {found['sizes']['model']}",
            "tokens/s",
            [(name, row[figure]) for name, row in found["medians"].items()],
            note,
        )
        for figure in ("prefill", "decode")
    }


def goodput_tables(found: Mapping[str, Any]) -> list[Table]:
    """One row for each point."""
    rows = [
        [
            f"{point['mtbf']:g} s, {'resumed' if point['resume'] else 'from zero'}",
            point["goodput"],
            point["closed_form"],
            point["kills"],
            point["finished"],
            point["delay_ms"],
        ]
        for point in found["points"]
    ]
    sizes = found["sizes"]
    notes = [
        f"Requests of {sizes['work']:g} s; {sizes['flight']} in flight, workers killed at random. "
        f"Measured with all times but the detection divided by {sizes['scale']:g}, {sizes['seconds']:g} s a point; "
        "the closed form is of the same.",
    ]
    heads = [
        "mean time between failures of a worker",
        "goodput",
        "closed form",
        "kills",
        "finished",
        "kill to step, ms",
    ]
    return [Table("Goodput: useful time of the workers that run requests", heads, rows, notes)]


def goodput_pictures(found: Mapping[str, Any], note: str) -> Pictures:
    """The closed form as curves, what was measured as points over it."""
    sizes = found["sizes"]
    scale, work = sizes["scale"], sizes["work"] / sizes["scale"]
    lines = []
    for resume, name in ((True, "resumed"), (False, "from zero")):
        points = [point for point in found["points"] if point["resume"] is resume]
        delay = sum(point["delay_ms"] for point in points) / max(1, len(points)) / 1000
        form = resumed if resume else from_zero
        grid = [10 ** (0.7 + 1.5 * place / 60) for place in range(61)]
        lines.append(Curve(f"{name}, closed form", [(mtbf, work / form(scale / mtbf, work, delay)) for mtbf in grid]))
        lines.append(Curve(f"{name}, measured", [(point["mtbf"], point["goodput"]) for point in points], marks=True))
    return {
        "goodput.svg": curves(
            f"Goodput of requests of {sizes['work']:g} s", "mean time between failures of a worker, s", "goodput",
            lines, log_x=True, note=f"all times but the detection divided by {scale:g}  ·  {note}",
        )
    }  # fmt: skip
