"""Workers that are simulated by their calls: what a courier and a guardian send, and how long that takes.

``python -m perdure.scripts.benchmarks.measures.stub URL WORKERS HELD SECONDS``: so many workers in one process, which
begin within so many seconds. For each line of its input it prints what it has counted since.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from ....protocol.codec import pack_entry
from ....protocol.connection import connect
from ....protocol.identities import new_id
from ....protocol.keys import key
from ....protocol.limits import MAX_REQUESTS
from ....protocol.settings import LEASE, Settings
from ....protocol.store import Store
from ....protocol.transitions.calls import Claim, Progress
from ....protocol.transitions.heartbeats import refreshed
from ....workers.leases.hearing import Hearing
from ....workers.redis_io.pace import Pace

TASK: Final = "app.tasks.stub"
QUEUE: Final = "stub"
ANSWER: Final = 60.0
"""Seconds that whoever is asked may take."""


@dataclass(slots=True)
class Figures:
    """Of the workers of one process, since they were asked for last."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    deaths: int = 0
    rows: int = 0
    claims: int = 0
    flying: int = 0
    in_flight: int = 0
    beats: list[float] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)

    def take(self) -> dict[str, Any]:
        """All of it, to begin anew."""
        with self.lock:
            found = {
                "deaths": self.deaths, "rows": self.rows, "claims": self.claims, "in_flight": self.in_flight,
                "beats": self.beats, "interval": statistics.fmean(self.intervals) if self.intervals else 0.0,
            }  # fmt: skip
            self.deaths = self.rows = self.claims = 0
            self.in_flight, self.beats, self.intervals = self.flying, [], []
        return found

    def sent(self) -> None:
        with self.lock:
            self.flying += 1
            self.in_flight = max(self.in_flight, self.flying)

    def answered(self) -> None:
        with self.lock:
            self.flying -= 1


@dataclass(slots=True)
class Stub:
    """One worker: what its courier and its guardian send."""

    url: str
    name: str
    held: int
    start: float
    """Seconds in which the workers of a pool begin."""
    figures: Figures
    settings: Settings = field(default_factory=Settings)
    incarnation: str = field(default_factory=new_id)
    claims: dict[str, Claim] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    hearing: dict[str, Hearing] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    stores: list[Store] = field(default_factory=list)

    def connect(self) -> None:
        """Before any begins: the handshakes of hundreds beside their work would take longer than they may."""
        for _ in range(2):
            store = Store(connect(self.url, timeout=ANSWER, check=False), self.settings)
            store.connection.ping()
            store.calling = self.figures.sent
            self.stores.append(store)

    def beat(self) -> None:
        """As a guardian does, for ever."""
        store = self.stores[0]
        store.called = lambda seconds: self.figures.answered()
        time.sleep(random.uniform(0, self.settings.heartbeat))
        whole = 0.0
        while True:
            began = time.monotonic()
            if began >= whole or not store.beat(self.incarnation):
                store.heartbeat(incarnation=self.incarnation, worker=self.name, queues=[QUEUE], pid=1, host=self.name)
                whole = began + refreshed(self.settings)
            with self.figures.lock:
                self.figures.beats.append(time.monotonic() - began)
            time.sleep(self.settings.heartbeat)

    def work(self) -> None:
        """As a courier does, for ever."""
        store = self.stores[1]

        def called(seconds: float) -> None:
            self.figures.answered()
            self.pace.took(seconds)

        store.called = called
        time.sleep(random.uniform(0, self.start))
        last = time.monotonic()
        longest = LEASE * self.settings.step_timeout / 4
        while True:
            if len(self.claims) < self.held and not self._claim(store):
                self._rejoin()
            interval = self.pace.interval(self.settings.checkpoint_interval, longest)
            time.sleep(max(0.0, last + interval - time.monotonic()))
            now = time.monotonic()
            with self.figures.lock:
                self.figures.intervals.append(now - last)
            last = now
            self._checkpoint(store)

    def _claim(self, store: Store) -> bool:
        if not self.claims:
            store.connection.blpop([key("bell", QUEUE)], timeout=1)
        store.calling()
        found = store.claim(
            incarnation=self.incarnation,
            worker=self.name,
            queues=[QUEUE],
            task=TASK if self.claims else "",
            free=self.held - len(self.claims),
            slots={TASK: self.held},
            known=list(self.claims),
            first_beat=5.0,
        )
        if found.status == "reaped":
            return False
        with self.figures.lock:
            self.figures.claims += 1
        for claim in found.claims:
            offset, seq = claim.offset, claim.seq
            if offset:
                store.all_outputs(claim.id)
                store.packed_state(claim.id)
            self.claims[claim.id], self.seqs[claim.id], self.hearing[claim.id] = claim, seq, Hearing()
        return True

    def _rejoin(self) -> None:
        self.claims.clear()
        with self.figures.lock:
            self.figures.deaths += 1
        time.sleep(random.uniform(0, self.pace.spread(self.settings.heartbeat_timeout)))
        self.incarnation = new_id()

    def _checkpoint(self, store: Store) -> None:
        rows, stored = [], 0
        for identifier, claim in self.claims.items():
            seq = self.seqs[identifier] = self.seqs[identifier] + 1
            offset = claim.offset + seq - claim.seq - 1
            rows.append(
                Progress(
                    id=identifier,
                    execution=claim.execution,
                    seq=seq,
                    offset=offset,
                    outputs=1,
                    blob=pack_entry(claim.epoch, offset, ["word"]),
                    state=None,
                    fingerprint="",
                    stepped=5.0,
                    tell=self.hearing[identifier].tell(),
                    brief=seq > claim.seq + 1 and not claim.watched,
                )
            )
        for first in range(0, len(rows), MAX_REQUESTS):
            part = rows[first : first + MAX_REQUESTS]
            for row, answer in zip(part, store.progress(self.incarnation, part), strict=True):
                if answer in ("ok", "heard"):
                    stored += 1
                    if answer == "heard":
                        self.hearing[row.id].listen()
                else:
                    del self.claims[row.id]
        with self.figures.lock:
            self.figures.rows += stored


def main() -> None:
    """Be so many workers; answer when figures are asked for."""
    url, workers, held, start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    figures = Figures()
    stubs = [Stub(url, new_id(), held, start, figures) for _ in range(workers)]
    for stub in stubs:
        stub.connect()
    for number, _ in enumerate(sys.stdin):
        if number == 1:  # all processes are connected
            for stub in stubs:
                for target in (stub.beat, stub.work):
                    threading.Thread(target=target, daemon=True).start()
        print(json.dumps(figures.take()), flush=True)


if __name__ == "__main__":
    main()
