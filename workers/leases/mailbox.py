"""What the engine loop is told: admissions, drops, what was stored, news of the members, and the stop."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...protocol.transitions.calls import Claim
from ..tasks.base import Request


@dataclass(frozen=True, slots=True)
class Admission:
    """A claimed request; its payload and its state are still packed."""

    claim: Claim
    request: Request


@dataclass(frozen=True, slots=True)
class Drop:
    """A request that must not be computed any further here."""

    id: str


@dataclass(frozen=True, slots=True)
class OutputsStored:
    """All that this request had put out is in Redis; it was waited for."""

    id: str
    execution: str


@dataclass(frozen=True, slots=True)
class News:
    """A step of a request that moves by itself has come, or a slot came free."""


@dataclass(frozen=True, slots=True)
class Stop:
    """No more steps."""


Letter = Admission | Drop | OutputsStored | News | Stop


class Mailbox:
    """Letters in order, from any thread to the main thread."""

    def __init__(self) -> None:
        self._bundles: queue.SimpleQueue[Sequence[Letter]] = queue.SimpleQueue()

    def put(self, letter: Letter) -> None:
        """Leave a letter. Never blocks."""
        self._bundles.put((letter,))

    def put_all(self, letters: Sequence[Letter]) -> None:
        """Leave several at once: whoever waits is woken once, and not while the rest is still being written."""
        if letters:
            self._bundles.put(letters)

    def take(self, *, wait: bool) -> Iterator[Letter]:
        """All letters that are there; with ``wait``, up to a second is waited for the first."""
        try:
            yield from self._bundles.get(timeout=1.0) if wait else self._bundles.get_nowait()
            while True:
                yield from self._bundles.get_nowait()
        except queue.Empty:
            return
