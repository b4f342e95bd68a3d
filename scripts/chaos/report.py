"""What a run has shown, for people and as JSON."""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .conductor import ChaosOptions
from .evidence import Evidence
from .judge import ChaosVerdict, recoveries
from .schedule import NAMES

COUNTS = ("lost", "duplicated", "unexpected", "stale_writes", "wrong_outputs", "charged", "leaked_keys")
"""What must be zero."""


def figures(options: ChaosOptions, evidence: Evidence, verdict: ChaosVerdict, scale: float) -> dict[str, Any]:
    """Everything that was counted; times in seconds."""
    times = recoveries(evidence)
    fired = Counter(item.kind for item in evidence.fired)
    worst = max((delay for delays in times.values() for delay in delays), default=None)
    return {
        "seed": options.seed,
        "seconds": options.seconds,
        "scale": scale,
        "attempted": verdict.attempted,
        "accepted": verdict.accepted,
        "recovered": verdict.recovered,
        "finished": verdict.finished,
        "refused": verdict.refused,
        "poisoned": verdict.poisoned,
        "resumed": verdict.resumed,
        "restarted": verdict.restarted,
        "outputs": verdict.outputs,
        "checkpoints_read": verdict.checkpoints_read,
        "kills": sum(item.killed for item in evidence.fired),
        "faults": sum(fired.values()),
        **{name: getattr(verdict, name) for name in COUNTS},
        "worst_recovery": _rounded(worst),
        "passed": not verdict.problems,
        "problems": verdict.problems,
        "fault_details": {
            kind: {
                "fired": fired[kind],
                "recovery_median": _rounded(statistics.median(times[kind])) if kind in times else None,
                "recovery_worst": _rounded(max(times[kind])) if kind in times else None,
            }
            for kind in evidence.enabled or fired
        },
        "events": [
            {
                "at": round(item.at - evidence.began, 3),
                "healed": round(item.healed - evidence.began, 3),
                "kind": item.kind,
                "interrupted": len(item.held),
                "note": item.note,
            }
            for item in evidence.fired
        ],
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def show(values: dict[str, Any], console: Console) -> None:
    """The table of faults, the counts, then the problems or the sentence that there is none."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("fault")
    for name in ("times", "median s", "worst s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for kind, detail in values["fault_details"].items():
        number = Text(str(detail["fired"]), "" if detail["fired"] else "bold red")
        times = [_shown(detail[name]) for name in ("recovery_median", "recovery_worst")]
        table.add_row(kind, number, *times, NAMES[kind].text)
    console.print(table)
    console.print()
    lines = (
        f"{values['accepted']} requests accepted, {values['finished']} finished, "
        f"{values['refused']} refused as they asked; "
        f"{values['recovered']} more were stored though their producer was not told",
        f"{values['faults']} faults, {values['kills']} of them kills; "
        f"{values['resumed']} requests went on from a checkpoint, "
        f"{values['restarted']} began again; worst recovery {_shown(values['worst_recovery'])} s",
        ", ".join(f"{name.replace('_', ' ')} {values[name]}" for name in COUNTS),
        f"seed {values['seed']}, {values['seconds']:g} s, scale {values['scale']:g}",
    )
    for line in lines:
        console.print(line, soft_wrap=True)
    for problem in values["problems"]:
        console.print(Text(f"FAILED: {problem}", "bold red"), soft_wrap=True)
    if values["passed"]:
        console.print(Text("Nothing lost, nothing twice, nothing different.", "bold green"))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
