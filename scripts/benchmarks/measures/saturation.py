"""The part ``saturation``: a pool near and beyond what one Redis can checkpoint at the usual interval, and a large one
that comes back.

Workers are simulated by their calls, some processes of many threads each: a heartbeat a second over one connection,
and over another one claims, reads of what to go on from, and a checkpoint of all that is held, as often as
:class:`~perdure.workers.redis_io.pace.Pace` allows. A reaper judges them. The server is driven with a quarter to one
and a half times what it could store by what a checkpoint costs it in a small pool. Then a large one is full, and nobody
may be declared dead; then all are, by hand, as after an outage, and come back. What that does to the server is seen by
one who pings it.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from ..figures import ratio
from ..processes import BenchmarkFailed, Crew, PeerProcess, wait_for
from ..stage import Stage
from . import stub
from .stub import ANSWER, QUEUE, TASK

PROCESSES: Final = 4
PING: Final = 0.01
"""Seconds between two pings."""


U: Final = 0.00003
BEAT: Final = 0.00003
"""Seconds of Redis for a checkpoint and for a heartbeat, as docs/production.md sizes a pool."""


def predicted(requests: int, workers: int, interval: float) -> float:
    """The share of Redis' core that docs/production.md names for so many running requests, of which nobody is heard."""
    return min(1.0, requests * U / interval + workers * BEAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturationSizes:
    """So many workers, each of which holds so many requests, begin within some seconds; watched for so many seconds."""

    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    few: int = 4
    """Workers of the small pool."""
    workers: int = 400
    held: int = 64
    start: float = 10.0
    seconds: float = 10.0
    back: float = 90.0
    """Seconds in which all must be held again."""


QUICK = SaturationSizes(shares=(0.5, 1.0, 1.5), workers=100, start=3.0, seconds=8.0)
SMOKE = SaturationSizes(shares=(0.02,), workers=8, held=8, start=0.0, seconds=1.0, back=30.0)


class SaturationBenchmark:
    """A pool that is watched while it is full, and while it comes back."""

    def __init__(self, stage: Stage, crew: Crew, sizes: SaturationSizes, say: Callable[[str], None]) -> None:
        self.stage, self.crew, self.sizes, self.say = stage, crew, sizes, say
        self.settings = Settings()
        logging.getLogger("perdure.reaper").addHandler(logging.NullHandler())  # a line for each request that it takes

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        sizes, interval = self.sizes, self.settings.checkpoint_interval
        small = self._level(sizes.few)
        capacity = small["checkpoints_a_second"] / small["core"]
        rows = [small]
        for share in sizes.shares:
            workers = max(sizes.few, round(share * capacity * interval / sizes.held))
            rows.append({"asked": share} | self._level(workers))
            self.say(f"{share:.0%}: {json.dumps(rows[-1])}")
        with self._pool(sizes.workers) as (agents, pings):
            full = self._watched(agents, pings)
            self.say(f"full: {json.dumps(full)}")
            pings.clear()
            began = time.monotonic()
            self._declare_dead()
            dead = time.monotonic()
            self._wait_held(agents, sizes.workers)
            held = time.monotonic()
            # What is counted is counted from the first that was declared dead.
            back = _figures(agents, pings, held - began) | {"seconds": round(held - dead, 1)}
            self.say(f"coming back: {json.dumps(back)}")
        return {"sizes": asdict(sizes), "capacity": round(capacity), "rows": rows, "full": full, "back": back}

    def _level(self, workers: int) -> dict[str, Any]:
        """A pool of so many workers, while all that they can hold runs."""
        requests = workers * self.sizes.held
        with self._pool(workers) as (agents, pings):
            found = {"workers": workers, "requests": requests} | self._watched(agents, pings)
        return found | {"predicted": predicted(requests, workers, self.settings.checkpoint_interval)}

    def _watched(self, agents: Sequence[PeerProcess], pings: list[float]) -> dict[str, Any]:
        time.sleep(2.0)
        _ask(agents)
        pings.clear()
        began, before = time.monotonic(), self.stage.sample()
        time.sleep(self.sizes.seconds)
        found, after = _figures(agents, pings, time.monotonic() - began), self.stage.sample()
        return found | {"core": (after.cpu - before.cpu) / (time.monotonic() - began)}

    @contextmanager
    def _pool(self, workers: int) -> Iterator[tuple[list[PeerProcess], list[float]]]:
        """Workers that hold all that they can, a reaper, and what pings took."""
        self.stage.clear()
        self._enqueue(workers * self.sizes.held)
        stop = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            reaper = pool.submit(
                Reaper(Store(connect(self.stage.url, timeout=ANSWER), self.settings), self.settings).run, stop
            )
            pings: list[float] = []
            pinging = pool.submit(self._ping, pings, stop)
            try:
                command = [sys.executable, "-m", stub.__name__, self.stage.url]
                what = [str(self.sizes.held), str(self.sizes.start)]
                parts = [len(range(place, workers, PROCESSES)) for place in range(PROCESSES)]
                agents = [
                    self.crew.agent([*command, str(part), *what], self.stage.url, f"stubs-{place}")
                    for place, part in enumerate(parts)
                ]
                _ask(agents)  # answered by those that are connected
                _ask(agents)
                self._wait_held(agents, workers)
                yield agents, pings
            finally:
                stop.set()
                self.crew.stop(at_once=True)
            reaper.result(ANSWER)
            pinging.result(ANSWER)

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

    def _wait_held(self, agents: Sequence[PeerProcess], workers: int) -> None:
        """Until every worker that is not dead holds all that it can."""
        expected = workers * self.sizes.held

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


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """What the levels are held to: throughput beyond the peak, heartbeats against their timeout, and the formula."""
    rows = found["rows"]
    last, peak = rows[-1], max(row["checkpoints_a_second"] for row in rows)
    timeout = 1000 * Settings().heartbeat_timeout
    return {
        "saturation_throughput_of_peak": ratio(last["checkpoints_a_second"], peak),
        "saturation_deaths": sum(row["deaths"] for row in rows) + found["full"]["deaths"],
        "saturation_beat_p99_of_timeout": ratio(last["beat_p99_ms"], timeout),
        "saturation_core_of_foretold": ratio(rows[0]["core"], rows[0]["predicted"]),
    }


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
        "interval": round(statistics.fmean(row["interval"] for row in found if row["interval"]), 3),
        "in_flight": sum(row["in_flight"] for row in found),
        "claims": sum(row["claims"] for row in found),
        "ping_p50_ms": round(1000 * statistics.median(pings), 1),
        "ping_worst_ms": round(1000 * max(pings), 1),
        "beats": len(beats),
        "beat_p50_ms": round(1000 * statistics.median(beats), 1) if beats else None,
        "beat_p99_ms": round(1000 * beats[int(0.99 * (len(beats) - 1))], 1) if beats else None,
        "beat_worst_ms": round(1000 * beats[-1], 1) if beats else None,
    }


# --- the processes of the workers ------------------------------------------------------------------------
