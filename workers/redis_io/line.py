"""The line: what the parts of the courier have in common to talk to Redis of this worker's requests."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import redis

from ...protocol.errors import PayloadTooLarge
from ...protocol.limits import MAX_BYTES, MAX_REQUESTS
from ...protocol.store import Store
from ...protocol.telemetry.logs import about
from ...protocol.transitions.calls import Chunk, Failure, Finish, Progress
from ...protocol.transport.refusals import passing
from ...recovery.failures import failure
from ..leases.holding import Handback, Holding
from ..leases.holdings import Holdings
from ..leases.mailbox import Drop
from .ledger import Measurements
from .pace import Pace

REFUSALS = 5
"""Calls in succession that Redis does not take of one request, while it answers others; then the request ends."""

REFUSAL_PAUSE = 0.05
"""Seconds before the second try; doubled each time."""

SILENT = 2.0
"""Seconds for which a server that has not answered is taken not to."""

Row = TypeVar("Row", Chunk, Progress, Finish, Failure)

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
    ledger: Measurements = field(init=False)
    pace: Pace = field(default_factory=Pace)
    _silent_until: float = 0.0

    def __post_init__(self) -> None:
        self.ledger = Measurements(self.holdings.settings.heartbeat, self.worker)

    def ask(self, keys: Keys, call: Callable[[Keys], list[str]]) -> None:
        """Ask about requests, as many at a time as one call takes, and act upon the answers."""
        for start in range(0, len(keys), MAX_REQUESTS):
            part = keys[start : start + MAX_REQUESTS]
            answers = call(part)
            with self.holdings.lock:
                for (name, execution), answer in zip(part, answers, strict=True):
                    if holding := self.holdings.current(name, execution):
                        self.hear(holding, answer)

    def send(
        self,
        rows: Sequence[Row],
        size: Callable[[Row], int],
        call: Callable[[Sequence[Row]], list[str]],
        settle: Callable[[Sequence[Row], list[str]], None],
    ) -> None:
        """Store or end requests, as many at a time as one call takes. ``settle`` acts upon the answers.

        A call that Redis refuses or cuts off, while it answers others, is that of one of its requests: each of them is
        sent alone from then on, after all others, and ends when that was in vain a few times.
        """
        now = time.monotonic()
        together: list[Row] = []
        alone: list[list[Row]] = []
        with self.holdings.lock:
            for row in rows:
                holding = self.holdings.current(row.id, row.execution)
                if holding is None or not holding.refused:
                    together.append(row)
                elif holding.quiet <= now:
                    alone.append([row])
        for part in [*chunks(together, size), *alone]:
            try:
                answers = call(part)
            except redis.RedisError as error:
                if not self._refused(part, error, sum(map(size, part))):
                    raise
            else:
                with self.holdings.lock:
                    for row in part:
                        if holding := self.holdings.current(row.id, row.execution):
                            holding.refused = 0
                settle(part, answers)

    def answers(self) -> bool:
        """Whether Redis answers now, over whatever connection."""
        if time.monotonic() < self._silent_until:
            return False  # an outage: asking each time would only make it longer
        try:
            self.store.connection.ping()
        except redis.RedisError:
            self._silent_until = time.monotonic() + SILENT
            return False
        return True

    def _refused(self, rows: Sequence[Row], error: redis.RedisError, size: int) -> bool:
        """Write down that a call was not taken; False if that is nothing of its requests'."""
        if passing(error) or not self.answers():
            return False
        with self.holdings.lock:
            for row in rows:
                holding = self.holdings.current(row.id, row.execution)
                if holding is None:
                    continue
                holding.refused += 1
                holding.quiet = time.monotonic() + REFUSAL_PAUSE * 2 ** (holding.refused - 1)
                if len(rows) == 1 and holding.refused >= REFUSALS:
                    self._give_up(holding, error, size)
        self.log.error("Redis did not take a call for %d request(s) (%d bytes): %s", len(rows), size, error)
        return True

    def _give_up(self, holding: Holding, error: redis.RedisError, size: int) -> None:
        """End a request whose calls Redis does not take (lock held)."""
        name, execution = holding.key
        if isinstance(holding.ended, Failure):
            # Not even that it has failed can be said. Its lease runs out.
            self.log.error(
                "request %s: Redis does not take its end either; dropped here", name, extra=about(name, execution)
            )
            self.holdings.let_go(name)
            return
        holding.drop()
        problem = PayloadTooLarge(
            f"Redis did not take what this request had to store: {REFUSALS} calls of {size:,} bytes were "
            f"refused or cut off ({type(error).__name__}: {str(error)[:200]}), while others were answered"
        )
        holding.ended = failure(name, execution, problem)
        self.holdings.urgent = True
        self.holdings.mailbox.put(Drop(name))

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
                "request %s: Redis holds fewer outputs than it had confirmed; handed back",
                name,
                extra=about(*holding.key),
            )
            self.holdings.handbacks.append(Handback(holding, "Redis lost outputs that it had confirmed"))


def chunks(rows: Sequence[Any], size: Callable[[Any], int]) -> Iterable[list[Any]]:
    """Split rows by the limits of one call; one row alone may exceed the bytes."""
    part: list[Any] = []
    total = 0
    for row in rows:
        if part and (len(part) >= MAX_REQUESTS or total + size(row) > MAX_BYTES):
            yield part
            part, total = [], 0
        part.append(row)
        total += size(row)
    if part:
        yield part
