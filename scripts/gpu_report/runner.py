"""Runs the steps one after the other, each as a process of its own with a time-out, and writes down what came of each.

A step that fails or hangs is a finding: its log is kept, all its processes are ended, and the next one runs.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from ...protocol.settings import PREFIX
from ..benchmarks.processes import BenchProcess
from .plan import ReportStep
from .stage import StepNotes

LOOK: Final = 0.2
"""Seconds between two looks at a step's processes."""

KEPT: Final = 500_000
"""Bytes of the end of a log that are kept."""

LEAST: Final = 3.0
"""Seconds without which no step is begun."""

OK, FINDING, SKIPPED, NOT_RUN = "ok", "finding", "skipped", "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What came of a step. ``missing`` names what this machine cannot show; a step that showed nothing
    else is skipped.
    """

    step: str
    title: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    log: str = ""


@dataclass(slots=True)
class Runner:
    """Writes ``results.jsonl`` and ``logs.tar`` into ``out`` after each step; all else goes into ``work``.

    ``deadline`` is the monotonic second at which all must be over; a step may take ``longer`` times its seconds.
    """

    out: Path
    work: Path
    device: str
    deadline: float
    say: Callable[[str], None]
    longer: float = 1.0
    outcomes: list[StepOutcome] = field(default_factory=list)

    def run(self, steps: Sequence[ReportStep]) -> None:
        """Run these. ``KeyboardInterrupt`` leaves what was written, and no process."""
        for name in ("results.jsonl", "logs.tar"):
            (self.out / name).unlink(missing_ok=True)
        for name in ("shared", "cache", "state", "tmp"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        for step in steps:
            outcome = self._step(step)
            self.outcomes.append(outcome)
            with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            self.say(
                f"{step.name}: {outcome.state}, {outcome.seconds:.1f} s" + f": {outcome.reason}" * bool(outcome.reason)
            )

    def _step(self, step: ReportStep) -> StepOutcome:
        folder = self.work / step.name
        folder.mkdir()
        log, notes = folder / "log", folder / "notes"
        limit = min(self.longer * step.seconds, self.deadline - time.monotonic())
        if limit < LEAST:
            return StepOutcome(step=step.name, title=step.title, state=NOT_RUN, reason="no time was left")
        command = [sys.executable, "-P", "-m", f"{__package__}.stage", step.target, self.device]
        began = time.monotonic()
        try:
            child = BenchProcess(
                [*command, *map(str, (notes, folder, self.work / "shared"))], self._environment(), log, folder=folder
            )
        except OSError as error:
            return StepOutcome(
                step=step.name, title=step.title, state=NOT_RUN, reason=f"it could not be started: {error}"
            )
        try:
            late = _watch(child, began + limit)
            status = child.process.returncode
        finally:
            self._keep(step.name, log)
        found = StepNotes.read(notes)
        reason = ""
        if late:
            reason = f"took more than {limit:.0f} s, and was ended"
        elif status:
            reason = found.error or f"it ended with status {status}"
        elif found.problems:
            reason = "; ".join(found.problems)
        state = FINDING if reason else SKIPPED if found.missing and not found.figures else OK
        return StepOutcome(
            step=step.name,
            title=step.title,
            state=state,
            reason=reason or "; ".join(found.missing),
            seconds=round(time.monotonic() - began, 2),
            figures=found.figures,
            problems=found.problems,
            missing=found.missing,
            log=f"logs.tar: {step.name}.log",
        )

    def _environment(self) -> dict[str, str]:
        """No settings of the person's own pool, and no place outside of the report's folder to write into."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "RQ_"))}
        places = {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "XDG_STATE_HOME": "state"}
        kept |= {name: str(self.work / place) for name, place in places.items()}
        return kept | {"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "1000"}

    def _keep(self, name: str, log: Path) -> None:
        """Beside the results, as one file: a machine may give back only so many."""
        parts = [log, *sorted(log.parent.rglob("*.log"))]
        text = b"".join(f"--- {part.name}\n".encode() + part.read_bytes()[-KEPT:] for part in parts if part.exists())
        entry = tarfile.TarInfo(f"{name}.log")
        entry.size = len(text)
        with tarfile.open(self.out / "logs.tar", "a") as archive:
            archive.addfile(entry, io.BytesIO(text))


def _watch(child: BenchProcess, deadline: float) -> bool:
    """Wait for the end of a step; True if it had to be ended. Nothing that it has started is left then.

    A guardian is in a session of its own, and a process whose parent has died is nobody's child any more: so all that
    were ever seen below the step are remembered.
    """
    seen: set[psutil.Process] = set()
    late = False
    try:
        while child.running and not late:
            seen |= _below(child.pid)
            time.sleep(LOOK)
            late = time.monotonic() > deadline
    finally:
        seen |= _below(child.pid)
        child.stop(at_once=True)
        for process in seen:
            seen = seen | _below(process.pid)
        for process in seen:
            try:
                process.kill()  # only if the number is still its own
            except psutil.Error:
                pass
    return late


def _below(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()
