"""The reaper: takes requests from the dead, and moves what is due.

A sweep is a few calls of scripts, each of which decides at its own moment by the server's clock. So
any number of reapers may run, any of them may die at any time, and a guardian sweeps in the same way
when no reaper does.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final

import redis

from ..protocol.records import FailureKind
from ..protocol.settings import Settings
from ..protocol.telemetry.logs import about
from ..protocol.transitions.calls import Reaped
from ..protocol.transitions.sweeps import Sweeps
from .degradation import Degradation
from .failures import POLICIES, describe
from .strays import find, take_back
from .unserved import unserved

log = logging.getLogger("perdure.reaper")

EXPIRE_INTERVAL: Final = 10.0
"""Seconds between two looks for stale checkpoints: they are an hour old, nobody waits for them."""

MAX_ROUNDS: Final = 32
"""Calls of ``reap`` in one sweep. What is left after them is taken by the next sweep, which follows at once."""

PORTION: Final = 64
"""Requests of one call of ``reap``: Redis does nothing else in it."""

UNSERVED_INTERVAL: Final = 0.5
"""Seconds between two looks at what workers cannot load."""

TURN: Final = 16
"""Queues that one sweep looks at beside those that are known to hold something beside their lists."""

NAMES_INTERVAL: Final = 5.0
"""Seconds between two readings of all queue names, which may be many: what a sweep must know at once is known aside."""

LOOKED: Final = 500
"""Entries of each of RQ's registries in which requests are looked for that its own worker left behind; its traces of a
run that ended come first in them.
"""

OUTAGE_BASE: Final = 0.1
OUTAGE_CAP: Final = 2.0
"""Seconds between two tries while Redis does not answer: doubling from base to cap."""


class Reaper:
    """One reaper, over a store of its own (a store is not for several threads at once).

    ``name`` is for people; it stands in front of every line that is logged.
    """

    def __init__(self, store: Sweeps, settings: Settings, name: str = "") -> None:
        self.store = store
        self.settings = settings
        self.name = name or f"reaper-{socket.gethostname()}-{os.getpid()}"
        self._expired_at = -EXPIRE_INTERVAL
        self._asked_at = -UNSERVED_INTERVAL
        self._degradation = Degradation(store, settings, self.name)
        self._outages = 0
        self._place = 0
        self._queues: list[str] = []
        self._named_at = -NAMES_INTERVAL
        self._more = False

    def sweep(self, *, expire: bool | None = None) -> list[Reaped]:
        """One round over all queues: reap, promote what is due, end what is late, see whether the pool is degraded, and
        now and then expire checkpoints.

        ``expire`` asks for the last (or forbids it); by default it is done every :data:`EXPIRE_INTERVAL`.
        Returns what was taken from the dead. Raises what redis-py raises, and ``ProtocolMismatch`` when Redis
        holds a newer protocol: what was done until then is done.
        """
        store = self.store
        # First: a script of this release must not touch what it may misread. (Few calls: each may take long.)
        aside = store.aside()
        now = time.monotonic()
        if expire is None:
            expire = now - self._expired_at >= EXPIRE_INTERVAL
        if expire or now - self._named_at >= NAMES_INTERVAL:
            self._queues, self._named_at = store.queues(), now
        reaped: list[Reaped] = []
        for _ in range(MAX_ROUNDS):
            began = time.monotonic()
            swept = store.reap(
                aside,
                limit=PORTION,
                kind=FailureKind.WORKER_LOST,
                reason=f"no heartbeat for {self.settings.heartbeat_timeout:g} s",
                **POLICIES[FailureKind.WORKER_LOST].flags,
            )
            answered = time.monotonic()
            for item in swept.reaped:
                self._report(item)
            reaped += swept.reaped
            self._more = swept.left and bool(swept.reaped)
            if not swept.left:
                break
            time.sleep(max(0.0, 2 * answered - began - time.monotonic()))  # what lives has half of Redis' time
        store.promote([*aside, *self._turn(aside)], rounds=MAX_ROUNDS)
        if time.monotonic() - self._asked_at >= UNSERVED_INTERVAL:
            self._asked_at = time.monotonic()
            self._give_up()
        self._degradation.watch()
        if expire:
            stale = store.expire(self._queues)
            self._take_back(self._queues)
            self._expired_at = time.monotonic()
            if stale:
                log.info("%s: deleted %d stale checkpoints", self.name, stale)
        return reaped

    def _turn(self, aside: Sequence[str]) -> list[str]:
        """Some of the other queues, in turn: what others have put into their lists or sets is found there in time."""
        others = sorted(set(self._queues).difference(aside))
        begin = self._place if self._place < len(others) else 0
        self._place = begin + TURN
        return others[begin : self._place]

    def _give_up(self) -> None:
        """End requests whose task no worker of their queue could load for long enough."""
        words, now = self.store.words()
        settings = self.settings
        for item in unserved(words, now, missing=settings.missing_timeout, broken=settings.unloadable_timeout):
            if not item.due:
                continue
            ended = self.store.give_up(item.queue, item.task, kind=item.kind, reason=item.reason, workers=item.workers)
            if ended > 0:
                log.warning("%s: %d requests ended: %s", self.name, ended, item.reason)

    def _take_back(self, queues: Sequence[str]) -> None:
        """Have requests wait again that a worker of RQ's own was killed with: nobody else looks where it left them."""
        strays = list(find(self.store, queues, most=LOOKED))
        for identifier in take_back(self.store, strays) if strays else ():
            log.warning("%s: %s waits again; a worker of RQ's own was killed with it", self.name, identifier)

    def run(self, stop: threading.Event) -> None:
        """Sweep every ``reap_interval`` until ``stop`` is set; ride out any error of Redis.

        Raises ``ProtocolMismatch`` when Redis holds a newer protocol.
        """
        while not stop.is_set():
            begin = time.monotonic()
            try:
                self.sweep()
            except (redis.RedisError, OSError) as error:
                self._log_outage(error)
                # Its address may lead to another server by now, where this one refuses as a replica.
                self.store.connection.connection_pool.disconnect()
                stop.wait(self._outage_delay())
                continue
            if self._outages:
                log.info("%s: Redis answers again", self.name)
                self._outages = 0
            if not self._more:
                stop.wait(max(0.0, self.settings.reap_interval - (time.monotonic() - begin)))

    def _log_outage(self, error: BaseException) -> None:
        if self._outages == 0:
            log.warning("%s: no sweep, trying again until it works: %s", self.name, describe(error))
        self._outages += 1

    def _outage_delay(self) -> float:
        """Seconds, spread so that the reapers of a pool do not come back in one moment."""
        delay = min(OUTAGE_CAP, OUTAGE_BASE * 2.0 ** min(self._outages - 1, 30))
        return random.uniform(delay / 2, delay)

    def _report(self, item: Reaped) -> None:
        if item.id:
            log.warning(
                "%s: %s %s is now %s (execution %s of worker %s)",
                self.name,
                item.kind,
                item.id,
                item.outcome,
                item.execution,
                item.worker or item.incarnation,
                extra=about(item.id, item.execution, worker=item.worker),
            )
        else:
            log.warning(
                "%s: %s worker %s is gone (%s)",
                self.name,
                item.kind,
                item.worker or "?",
                item.incarnation,
                extra={"worker": item.worker},
            )
