"""The line: what the parts of the courier have in common to talk to Redis of this worker's requests."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..protocol.logs import about
from ..protocol.scripts import MAX_REQUESTS
from ..protocol.store import Store
from .holding import Holding
from .holdings import Handback, Holdings
from .ledger import Ledger
from .mailbox import Drop

Keys = Sequence[tuple[str, str]]
"""Ids and executions of requests."""


@dataclass(slots=True)
class Line:
    """For the courier's thread: the store, under which incarnation it is used, and what is done with its answers."""

    store: Store
    worker: str
    holdings: Holdings
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.holdings.settings.heartbeat, self.worker)

    def ask(self, keys: Keys, call: Callable[[Keys], list[str]]) -> None:
        """Ask about requests, as many at a time as one call takes, and act upon the answers."""
        for start in range(0, len(keys), MAX_REQUESTS):
            part = keys[start : start + MAX_REQUESTS]
            answers = call(part)
            with self.holdings.lock:
                for (name, execution), answer in zip(part, answers, strict=True):
                    if holding := self.holdings.current(name, execution):
                        self.hear(holding, answer)

    def hear(self, holding: Holding, answer: str) -> None:
        """Act upon what Redis says of one holding (lock held)."""
        name = holding.claim.id
        if answer == "cancel" and not holding.canceling and not holding.finishing:
            holding.cancel()
            self.holdings.urgent = True
            self.holdings.mailbox.put(Drop(name))
        elif answer == "lost":
            self.log.warning("request %s was given to another worker; dropped here", name, extra=about(*holding.key))
            self.holdings.let_go(name)
        elif answer == "deadline":
            self.log.warning("request %s: its deadline has passed; it was ended", name, extra=about(*holding.key))
            self.ledger.left(holding, "failed", "DEADLINE")
            self.holdings.let_go(name)
        elif answer.startswith("gap"):
            # Redis has lost its last second: what it has is the truth, and a new claim goes on from there.
            self.log.warning(
                "request %s: Redis holds fewer outputs than it had confirmed; handed back", name,
                extra=about(*holding.key),
            )  # fmt: skip
            self.holdings.handbacks.append(Handback(holding, "Redis lost outputs that it had confirmed"))
