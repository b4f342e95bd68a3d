"""What a fault is, and what it acts upon. A fault is fired once and healed once; what it did stands in its record.

``fire`` returns False while there is nobody to harm, and is asked again. ``heal`` is asked from the planned end on
until it returns True: what was armed has happened by then.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...producer import Client
from ...protocol.keys import key
from ...protocol.settings import Settings
from ...protocol.store import Store
from ..pool.server import Server
from .crew import ChaosProcesses, Target
from .journal import Journal
from .proxy import Proxy
from .schedule import NAMES, Planned


@dataclass(slots=True)
class FaultTargets:
    """What faults act upon. ``server`` and ``proxy`` are ``None`` where this run may not touch them."""

    crew: ChaosProcesses
    store: Store
    client: Client
    journal: Journal
    server: Server | None
    proxy: Proxy | None
    settings: Settings
    folder: Path
    late: bool = False
    """Who loads the model is spared: nobody could load it again before the end."""

    def victim(self, choice: float) -> Target | None:
        """A worker that holds something, by a number in [0, 1).

        Not one whose request was alone with all but one of the lost workers that make a dead letter: promise P6 ends it
        with the next, and everything that was accepted is to finish here. Requests that do end so are a kind of their
        own.
        """
        targets = self.crew.targets(self.store)
        busy = [target for target in targets if target.held and not (self.late and target.loaded)]
        busy = [target for target in busy if not (len(target.held) == 1 and self._last_chance(target.held[0]))]
        return busy[int(choice * len(busy))] if busy else None

    def _last_chance(self, identifier: str) -> bool:
        crashes: Any = self.store.connection.hget(key("job", identifier), "crashes")
        return int(crashes or 0) >= self.settings.max_crashes - 1

    def executions(self, target: Target) -> dict[str, str]:
        """What a worker holds: request -> execution."""
        held: Any = self.store.connection.hgetall(key("held", target.incarnation))
        return {name.decode(): execution.decode() for name, execution in held.items()}


@dataclass(slots=True)
class Fired:
    """What one fault did. Times are monotonic seconds; ``held`` is what its victim held: request -> execution."""

    kind: str
    at: float
    healed: float = 0.0
    held: dict[str, str] = field(default_factory=dict)
    killed: int = 0
    note: str = ""


class Fault:
    """One planned fault, and how far it has come."""

    def __init__(self, planned: Planned, number: int) -> None:
        self.planned = planned
        self.number = number
        self.fired: Fired | None = None
        self.happened = False

    def fire(self, stage: FaultTargets) -> bool:
        """Do it; False if it is not possible now."""
        raise NotImplementedError

    def heal(self, stage: FaultTargets) -> bool:
        """Undo it; False to be asked again. Most need no healing."""
        self.happened = True
        return True

    def undo(self, stage: FaultTargets) -> None:
        """At the end of the run, whatever has come of it."""

    def _fired(self, held: dict[str, str] | None = None, note: str = "") -> bool:
        killed = NAMES[self.planned.kind].kills
        self.fired = Fired(self.planned.kind, time.monotonic(), held=held or {}, killed=killed, note=note)
        return True
