"""The part ``saturation``: more requests than one Redis can checkpoint at the usual interval, and a pool that comes back.

Workers are simulated by their calls, some processes of many threads each: a heartbeat a second over one connection,
and over another one claims, reads of what to go on from, and a checkpoint of all that is held, as often as
:class:`~perdure.workers.redis_io.pace.Pace` allows. A reaper judges them. Nobody may be declared dead; then all are,
by hand, as after an outage, and come back. What that does to the server is seen by one who pings it.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ....protocol.codec import pack, pack_entry
from ....protocol.connection import connect
from ....protocol.identities import new_id
from ....protocol.keys import key
from ....protocol.limits import MAX_REQUESTS
from ....protocol.records import FailureKind, NewRequest
from ....protocol.settings import LEASE, Settings
from ....protocol.store import Store
from ....protocol.transitions.calls import Claim, Progress
from ....recovery.reaper import Reaper
from ....workers.redis_io.pace import Pace
from ..processes import BenchmarkFailed, Crew, PeerProcess, wait_for
from ..stage import Stage

TASK: Final = "app.tasks.stub"
QUEUE: Final = "stub"
PROCESSES: Final = 4
PING: Final = 0.01
"""Seconds between two pings."""

ANSWER: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturationSizes:
    """So many workers, each of which holds so many requests, begin within some seconds; watched for so many seconds."""

    workers: int = 400
    held: int = 64
    start: float = 10.0
    seconds: float = 10.0
    back: float = 90.0
    """Seconds in which all must be held again."""


QUICK = SaturationSizes(workers=100, start=3.0, seconds=8.0)
SMOKE = SaturationSizes(workers=8, held=8, start=0.0, seconds=1.0, back=30.0)


class SaturationBenchmark:
    """A pool that is watched while it is full, and while it comes back."""

    def __init__(self, stage: Stage, crew: Crew, sizes: SaturationSizes, say: Callable[[str], None]) -> None:
        self.stage, self.crew, self.sizes, self.say = stage, crew, sizes, say
        self.settings = Settings()
        logging.getLogger("perdure.reaper").addHandler(logging.NullHandler())  # a line for each request that it takes

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        self.stage.clear()
        number = self.sizes.workers * self.sizes.held
        self._enqueue(number)
        stop = threading.Event()
        per = self.sizes.workers // PROCESSES
        with ThreadPoolExecutor(2) as pool:
            reaper = pool.submit(
                Reaper(Store(connect(self.stage.url, timeout=ANSWER), self.settings), self.settings).run, stop
            )
            pings: list[float] = []
            pinging = pool.submit(self._ping, pings, stop)
            try:
                what = [str(per), str(self.sizes.held), str(self.sizes.start)]
                command = [sys.executable, "-m", __spec__.name, self.stage.url, *what]
                agents = [self.crew.agent(command, self.stage.url, f"stubs-{place}") for place in range(PROCESSES)]
                _ask(agents)  # answered by those that are connected
                _ask(agents)
                self._wait_held(agents)
                time.sleep(2.0)
                _ask(agents)
                pings.clear()
                began = time.monotonic()
                time.sleep(self.sizes.seconds)
                full = _figures(agents, pings, time.monotonic() - began)
                self.say(f"full: {json.dumps(full)}")
                pings.clear()
                began = time.monotonic()
                self._declare_dead()
                dead = time.monotonic()
                self._wait_held(agents)
                held = time.monotonic()
                # What is counted is counted from the first that was declared dead.
                back = _figures(agents, pings, held - began) | {"seconds": round(held - dead, 1)}
                self.say(f"coming back: {json.dumps(back)}")
            finally:
                stop.set()
                self.crew.stop(at_once=True)
            reaper.result(ANSWER)
            pinging.result(ANSWER)
        return {"sizes": asdict(self.sizes), "full": full, "back": back}

    def _enqueue(self, number: int) -> None:
        store, payload = Store(self.stage.connection, self.settings), pack({"n": 1}, limit=1000, what="payload")
        for first in range(0, number, MAX_REQUESTS):
            store.enqueue([
                NewRequest(
                    id=(identifier := new_id()), nonce=identifier, queue=QUEUE, task=TASK, payload=payload, max_retries=3,
                    result_ttl=86_400, failure_ttl=604_800, description=TASK,
                )
                for _ in range(min(MAX_REQUESTS, number - first))
            ])  # fmt: skip

    def _ping(self, pings: list[float], stop: threading.Event) -> None:
        with connect(self.stage.url, timeout=ANSWER) as connection:
            while not stop.wait(PING):
                began = time.monotonic()
                connection.ping()
                pings.append(time.monotonic() - began)

    def _wait_held(self, agents: Sequence[PeerProcess]) -> None:
        """Until every worker that is not dead holds all that it can."""
        expected = self.sizes.workers // PROCESSES * PROCESSES * self.sizes.held

        def held() -> bool:
            time.sleep(0.2)
            return self.stage.connection.zcard(key("leases", QUEUE)) >= expected

        wait_for("all requests are held", held, self.sizes.back, agents)

    def _declare_dead(self) -> None:
        store = Store(self.stage.connection, self.settings)
        for row in store.workers():
            while store.reap(
                incarnation=row["incarnation"], kind=FailureKind.WORKER_LOST, reason="declared dead by hand"
            ).left:
                pass


def _ask(agents: Sequence[PeerProcess]) -> list[dict[str, Any]]:
    for agent in agents:
        agent.tell(figures=True)
    return [agent.hear(ANSWER) for agent in agents]


def _figures(agents: Sequence[PeerProcess], pings: Sequence[float], seconds: float) -> dict[str, Any]:
    found = _ask(agents)
    if not pings:
        raise BenchmarkFailed("nobody pinged")
    beats = sorted(beat for row in found for beat in row["beats"])
    return {
        "seconds": round(seconds, 1),
        "deaths": sum(row["deaths"] for row in found),
        "checkpoints_a_second": round(sum(row["rows"] for row in found) / seconds),
        "interval": round(statistics.fmean(row["interval"] for row in found), 3),
        "in_flight": sum(row["in_flight"] for row in found),
        "claims": sum(row["claims"] for row in found),
        "ping_p50_ms": round(1000 * statistics.median(pings), 1),
        "ping_worst_ms": round(1000 * max(pings), 1),
        "beats": len(beats),
        "beat_p50_ms": round(1000 * statistics.median(beats), 1) if beats else None,
        "beat_worst_ms": round(1000 * beats[-1], 1) if beats else None,
    }


# --- the processes of the workers ------------------------------------------------------------------------


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
        while True:
            began = time.monotonic()
            store.heartbeat(incarnation=self.incarnation, worker=self.name, queues=[QUEUE], pid=1, host=self.name)
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
            incarnation=self.incarnation, worker=self.name, queues=[QUEUE], task=TASK if self.claims else "",
            free=self.held - len(self.claims), slots={TASK: self.held}, known=list(self.claims), first_beat=5.0,
        )  # fmt: skip
        if found.status == "reaped":
            return False
        with self.figures.lock:
            self.figures.claims += 1
        for claim in found.claims:
            offset, seq = claim.offset, claim.seq
            if offset:
                store.all_outputs(claim.id)
                store.packed_state(claim.id)
            self.claims[claim.id], self.seqs[claim.id] = claim, seq
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
            rows.append(Progress(
                id=identifier, execution=claim.execution, seq=seq, offset=offset, outputs=1,
                blob=pack_entry(claim.epoch, offset, ["word"]), state=None, fingerprint="", stepped=5.0,
            ))  # fmt: skip
        for first in range(0, len(rows), MAX_REQUESTS):
            part = rows[first : first + MAX_REQUESTS]
            for row, answer in zip(part, store.progress(self.incarnation, part), strict=True):
                if answer == "ok":
                    stored += 1
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
