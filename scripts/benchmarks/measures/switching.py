"""A worker that stores checkpoints for a while, then none for a while, and so on, and what that shows.

Two generations one after the other differ by a tenth on a machine that is shared: more than what checkpoints cost. So
one and the same generation is cut into windows, with checkpoints and without, and each window with is compared with
the two beside it.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....workers.engine.loop import EngineLoop
from ....workers.guardian.companion import Companion
from ....workers.leases.holdings import Holdings
from ....workers.redis_io.courier import Courier
from ....workers.rq.worker import Worker

OFF = 100_000.0
"""Seconds between checkpoints where there are to be none."""

NOTES = "BENCH_SWITCHES"
WINDOW = "BENCH_WINDOW"
"""The file that the switches are noted in, and the seconds between two."""

SETTLE = 0.35
"""The part of a window that is left out: what was not stored in the one before is stored first."""

FEWEST = 5
"""Passes of a window that is looked at."""


class SwitchingWorker(Worker):
    """The worker as it is, but for the interval between checkpoints."""

    def _run(self, loop: EngineLoop, courier: Courier, companion: Companion) -> bool:
        threading.Thread(target=_switch, args=(courier.holdings,), name="switch", daemon=True).start()
        return super()._run(loop, courier, companion)


def _switch(holdings: Holdings) -> None:
    usual = holdings.settings
    never = usual.replace(checkpoint_interval=OFF)
    with Path(os.environ[NOTES]).open("a", buffering=1, encoding="ascii") as notes:
        for on in itertools.cycle((False, True)):
            with holdings.lock:
                holdings.settings = usual if on else never
            notes.write(f"{time.monotonic_ns()} {int(on)}\n")
            time.sleep(float(os.environ[WINDOW]))


def read_switches(path: Path) -> list[tuple[float, bool]]:
    """When (monotonic seconds) it was switched, and whether on."""
    rows = [line.split() for line in path.read_text(encoding="ascii").split("\n")[:-1]]
    return [(int(at) / 1e9, on == "1") for at, on in rows]


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass: when it ended (monotonic seconds), and whether every slot got a token in it."""

    at: float
    full: bool


def compare(passes: Sequence[Pass], switches: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Tokens/s with checkpoints against those without: one ratio for each window with, and their median.

    ``low`` and ``high`` hold the median between them with 95 % confidence, by the order of the ratios alone (the sign
    test): n / 2 ± 0.98 √n.
    """
    windows = [
        (on, _rate(passes, at + SETTLE * (until - at), until)) for (at, on), (until, _) in itertools.pairwise(switches)
    ]
    found = []
    for before, here, after in zip(windows, windows[1:], windows[2:], strict=False):
        if here[0] and before[1] and here[1] and after[1]:
            found.append(here[1] / statistics.mean((before[1], after[1])))
    found.sort()
    number = len(found)
    rank = math.floor(number / 2 - 0.98 * math.sqrt(number))  # from either end, counted from 1; too few have none
    return {
        "windows": number,
        "ratio": statistics.median(found) if found else None,
        "low": found[rank - 1] if rank > 0 else None,
        "high": found[number - rank] if rank > 0 else None,
        "each": [round(value, 4) for value in found],
    }


def _rate(passes: Sequence[Pass], begin: float, end: float) -> float | None:
    """Passes a second; ``None`` where not all were full, or too few."""
    inside = [item for item in passes if begin <= item.at < end]
    if len(inside) < FEWEST or not all(item.full for item in inside):
        return None
    return (len(inside) - 1) / (inside[-1].at - inside[0].at)
