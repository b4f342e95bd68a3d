"""Uploads: how states above 1 MiB get to Redis, a chunk at a time.

A chunk is nothing by itself: when all of a state are there, the checkpoint's `progress` commits them, and a
reader sees the old state or the new one. A round of the courier spends a bounded time here, since the
leases of all other requests are renewed between two rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...protocol.packed_state import stored
from ...protocol.transitions.calls import Chunk, Progress
from .line import Line

BUDGET = 0.05
"""Seconds of one round; the chunk on its way is waited for."""


@dataclass(slots=True)
class Uploads:
    """The large states of one worker that are on their way."""

    line: Line
    heard: Callable[[Progress, str], None]
    """Called with what Redis says of a request that cannot go on."""
    busy: bool = False
    """More is to be sent: the next round need not wait."""
    _written: dict[tuple[str, int], int] = field(default_factory=dict)
    """Execution and seq -> how many chunks of its state Redis has."""

    def advance(self, rows: Sequence[Progress]) -> list[Progress]:
        """Write chunks for a while; returns the rows that can be stored now, in their order.

        ``rows`` are all that is on its way: what is not among them any more is forgotten.
        """
        self.busy = False
        keys = {(row.execution, row.seq) for row in rows}
        self._written = {key: number for key, number in self._written.items() if key in keys}
        end = time.monotonic() + BUDGET
        refused: set[str] = set()
        # One of each in turn: a small one does not wait for a large one.
        left = [row for row in rows if self._left(row)]
        while left:
            for row in left:
                if not self._write_next(row):
                    refused.add(row.execution)
            left = [row for row in left if self._left(row) and row.execution not in refused]
            if time.monotonic() >= end:
                break
        self.busy = bool(left)
        return [row for row in rows if row.execution not in refused and not self._left(row)]

    def again(self, row: Progress) -> None:
        """Redis has lost chunks of this row's state: all are written anew."""
        self._written.pop((row.execution, row.seq), None)
        self.busy = True

    def _left(self, row: Progress) -> int:
        return stored(row.state).chunks - self._written.get((row.execution, row.seq), 0)

    def _write_next(self, row: Progress) -> bool:
        state, number = stored(row.state), self._written.get((row.execution, row.seq), 0)
        chunk = Chunk(
            id=row.id,
            execution=row.execution,
            seq=row.seq,
            total=state.chunks,
            number=number + 1,
            data=state.pieces[number],
        )
        answers: list[str] = []
        self.line.send(
            [chunk], lambda chunk: len(chunk.data), self.line.store.write_chunks, lambda _, heard: answers.extend(heard)
        )
        if answers == ["ok"]:
            self._written[row.execution, row.seq] = number + 1
            return True
        if answers:
            self.heard(row, answers[0])
        return False
