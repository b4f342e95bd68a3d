"""What the demonstration shows: answers as they stream, then the figures. Live with a terminal, else plain lines."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .run import Answer, Record
from .verdict import DemoVerdict

KINDS = {"worker": "kill -9 of a worker alone", "tree": "kill -9 of a worker and its whole process tree"}


class Screen:
    """Draws at most every ``interval`` seconds; called from several threads."""

    def __init__(self, interval: float) -> None:
        self.console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._interval = interval
        self._lock = threading.Lock()
        self._drawn = 0.0
        self._ended: set[str] = set()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the live drawing; what is printed now stays. Harmless when repeated."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def say(self, line: str) -> None:
        """One line that stays."""
        with self._lock:
            self.console.print(Text(line, style="bold red" if line.startswith("kill") else ""))

    def show(self, record: Record) -> None:
        """The answers so far; without a terminal, each once, when it has ended."""
        with self._lock:
            if self._live is None:
                for number, answer in enumerate(record.answers, 1):
                    if answer.done and answer.handle.id not in self._ended:
                        self._ended.add(answer.handle.id)
                        self.console.print(Text(f"{number:2}. {len(answer.outputs):3} tokens  {_tail(answer, 90)}"))
            elif time.monotonic() - self._drawn >= self._interval or all(answer.done for answer in record.answers):
                self._drawn = time.monotonic()
                self._live.update(_answers(record, self.console.width), refresh=True)

    def report(self, verdict: DemoVerdict, seconds: float) -> None:
        """The figures, then the problems or the sentence that there is none."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("request", "workers", "tokens", "computed twice", "equal"):
            table.add_column(name, justify="right" if name in ("tokens", "computed twice") else "left")
        for number, row in enumerate(verdict.rows, 1):
            twice = f"{row.recomputed} (≤ {row.allowed})" if row.interruptions else str(row.recomputed)
            equal = Text("yes", "green") if row.equal else Text("NO", "bold red")
            table.add_row(str(number), " → ".join(row.workers), str(row.tokens), twice, equal)
        self.console.print(table)
        self.console.print()
        for kill in verdict.kills:
            delay = f"{kill['recovery_ms']:,.0f} ms" if kill["recovery_ms"] is not None else "never"
            self.console.print(
                f"{KINDS[kill['kind']]}: {kill['interrupted']} generations interrupted, "
                f"next token elsewhere after {delay}",
                soft_wrap=True,
            )
        figures: dict[str, Any] = verdict.as_dict()
        self.console.print(
            f"{figures['requests']} requests, {figures['tokens']} tokens, {figures['recomputed']} computed twice; "
            f"lost {figures['lost']}, duplicated {figures['duplicated']}, different {figures['different']}; "
            f"{seconds:.0f} s",
            soft_wrap=True,
        )
        for problem in verdict.problems:
            self.console.print(Text(f"FAILED: {problem}", "bold red"))
        if not verdict.problems:
            self.console.print(Text("Every answer is byte for byte the one that no crash has touched.", "bold green"))


def _answers(record: Record, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    for number, answer in enumerate(record.answers, 1):
        mark = (
            Text("✓", "green") if answer.result is not None else Text("✗", "red") if answer.error else Text("…", "dim")
        )
        table.add_row(
            f"{number:2}", mark, f"{len(answer.outputs):3}", Text(_tail(answer, max(20, width - 12)), no_wrap=True)
        )
    return table


def _tail(answer: Answer, width: int) -> str:
    """The end of an answer on one line, without characters that could steer a terminal."""
    text = answer.error or "".join(output["text"] for output in answer.outputs)
    plain = "".join(character if character.isprintable() else " " for character in text)
    return plain if len(plain) <= width else "…" + plain[1 - width :]
