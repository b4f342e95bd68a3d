"""The part ``saturation``: more requests than one Redis can checkpoint at the usual interval, and a pool that comes
back.

Workers are simulated by their calls, some processes of many threads each: a heartbeat a second over one connection,
and over another one claims, reads of what to go on from, and a checkpoint of all that is held, as often as
:class:`~perdure.workers.redis_io.pace.Pace` allows. A reaper judges them. Nobody may be declared dead; then all are,
by hand, as after an outage, and come back. What that does to the server is seen by one who pings it.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

from ....protocol.codec import pack
from ....protocol.connection import connect
from ....protocol.identities import new_id
from ....protocol.keys import key
from ....protocol.limits import MAX_REQUESTS
from ....protocol.records import FailureKind, NewRequest
from ....protocol.settings import Settings
from ....protocol.store import Store
from ....recovery.reaper import Reaper
from ..processes import BenchmarkFailed, Crew, PeerProcess, wait_for
from ..stage import Stage
from . import stub
from .stub import ANSWER, QUEUE, TASK

PROCESSES: Final = 4
PING: Final = 0.01
"""Seconds between two pings."""


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
                command = [sys.executable, "-m", stub.__name__, self.stage.url, *what]
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
            store.enqueue(
                [
                    NewRequest(
                        id=(identifier := new_id()),
                        nonce=identifier,
                        queue=QUEUE,
                        task=TASK,
                        payload=payload,
                        max_retries=3,
                        result_ttl=86_400,
                        failure_ttl=604_800,
                        description=TASK,
                    )
                    for _ in range(min(MAX_REQUESTS, number - first))
                ]
            )

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
