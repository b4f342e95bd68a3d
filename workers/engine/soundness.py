"""Whether an engine whose step has raised is broken, or one of its requests is to blame.

Nobody can tell from one error. A step that raised with several in flight accuses them all, as a crash does: they run on
in halves, here or elsewhere, until it is clear which it was. One that was alone is charged only if this engine is known
to be sound: since it last raised, it has stepped another request well, or its task's own probe says so. Otherwise:

1. the request goes back, uncharged and for a moment, so that another one may prove the engine;
2. three steps that raised in succession, no two of them with a request in common, are the engine's fault, unless its
   probe says that it computes;
3. one request that comes back a second time with no proof in between may be either: a fresh process is to tell, and
   the request counts as one that was alone with a worker that crashed. The third of those makes it a dead letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

BROKEN: Final = 3
"""Steps that raise in succession, no two with a request in common, after which the engine is broken."""

TWICE: Final = 2
"""How often one request may raise alone in one process where nothing proves the engine."""

REMEMBERED: Final = 256
"""Requests of which it is remembered that they have raised."""


class Blame(Enum):
    """What follows from a step that has raised."""

    ALL = auto()
    """Those in flight are suspects; nothing is counted."""
    REQUEST = auto()
    """It is charged like an error of its own."""
    UNKNOWN = auto()
    """It goes back uncharged."""
    ENGINE = auto()
    """All go back uncharged, and the process leaves."""
    EITHER = auto()
    """The request counts as having crashed this worker alone, and the process leaves."""


@dataclass(slots=True)
class Soundness:
    """What the steps of one engine have shown of it."""

    _well: set[str] = field(default_factory=set)
    """Two requests, or fewer, that were stepped well since the engine last raised: more prove no more."""
    _streak: list[frozenset[str]] = field(default_factory=list)
    """Who was in the steps that raised in succession."""
    _unproven: Counter[str] = field(default_factory=Counter)
    """How often a request has raised alone, uncharged."""

    def stepped(self, requests: Collection[str]) -> None:
        """A step of these went well."""
        if len(self._well) < 2:
            self._well.update(list(requests)[:2])
        if self._streak and not self._streak[-1].issuperset(requests):
            self._streak.clear()

    def raised(self, requests: Collection[str], probe: Callable[[], bool | None] = lambda: None) -> Blame:
        """A step of these has raised; ``probe`` says whether the engine computes, or ``None`` if nobody can tell."""
        others = self._well.difference(requests)
        self._well.clear()
        self._streak = [*self._streak[1 - REMEMBERED :], frozenset(requests)]
        broken, single = self._strangers() >= BROKEN, len(requests) == 1
        sound = probe() if broken or (single and not others) else None
        if sound:
            self._streak.clear()
        elif broken or sound is False:
            return Blame.ENGINE
        if not single:
            return Blame.ALL
        if others or sound:
            return Blame.REQUEST
        (alone,) = requests
        if len(self._unproven) >= REMEMBERED:
            self._unproven.clear()
        self._unproven[alone] += 1
        return Blame.EITHER if self._unproven[alone] >= TWICE else Blame.UNKNOWN

    def _strangers(self) -> int:
        """How many of the steps that raised in succession had no request in common, each with each of them.

        Two requests that raise by turns are two, however often: they are to blame, and not the engine.
        """
        seen: set[str] = set()
        number = 0
        for members in sorted(self._streak, key=len):
            if seen.isdisjoint(members):
                seen |= members
                number += 1
        return number
