"""What a person sees of a batch: a bar on a terminal, else a line every few seconds. All of it on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import click

from ..present.console import one_line
from .tally import Tally

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

EVERY: Final = 5.0
"""Seconds between two plain lines."""

REDRAW: Final = 0.1

WAITING: Final = {
    "full": "the queue is full",
    "degraded": "the pool is degraded",
    "memory": "Redis is at its maxmemory",
    "redis": "Redis does not answer",
}


class ProgressScreen:
    """Shows a tally while it grows."""

    def __init__(self, *, terminal: bool | None = None) -> None:
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Bar | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        if self._terminal:
            self._bar = _bar()
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=None, facts="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def show(self, tally: Tally) -> None:
        now = time.monotonic()
        over = tally.ended == tally.lines
        if not over and now - self._shown < (EVERY if self._bar is None else REDRAW):
            return
        self._shown = now
        if self._bar is None:
            click.echo(line(tally), err=True)
        else:
            (task,) = self._bar.task_ids
            self._bar.update(task, total=tally.lines, completed=tally.ended, facts=facts(tally), refresh=True)

    def say(self, text: str) -> None:
        if self._bar is None:
            click.echo(f"batch: {one_line(text)}", err=True)
        else:
            self._bar.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)


def line(tally: Tally) -> str:
    """The tally on a line of its own."""
    return f"batch: {tally.ended:,} of {tally.lines:,} lines ({100 * tally.ended // tally.lines} %), {facts(tally)}"


def facts(tally: Tally) -> str:
    """What a bar cannot show."""
    _, tokens = tally.speed()
    left = tally.left()
    parts = [f"{tally.in_flight:,} in flight"]
    if tally.failures:
        parts.insert(0, f"{tally.failures:,} failed")
    if tally.tokens:
        parts.append(f"{tokens:,.0f} tokens/s")
    parts.append(f"{tally.resumes:,} {'resume' if tally.resumes == 1 else 'resumes'}")
    if tally.waiting_for:
        parts.append(WAITING[tally.waiting_for])
    elif left is not None and tally.ended < tally.lines:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _bar() -> Bar | None:
    """A bar, if rich is installed: the plain lines say the same."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        return None
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,
    )
