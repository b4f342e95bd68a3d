"""The part ``scale``: what an operation costs beside a thousand and beside a million requests that it does not touch.

The server is filled by the calls that producers and workers make; workers are simulated by their calls alone. At
each size the same operations are carried out and the server is asked what they cost it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ....producer import Client
from ....protocol.codec import pack
from ....protocol.identities import new_id
from ....protocol.limits import MAX_REQUESTS
from ....protocol.records import FailureKind, NewRequest
from ....protocol.settings import Settings
from ....protocol.store import Store
from ....protocol.transitions.calls import Failure
from ..processes import BenchmarkFailed
from ..stage import Stage

TASK = "app.tasks.noop"
WAITING, HELD, FAILING, LATE = "waiting", "held", "failing", "late"
LONG = 100_000.0
"""Seconds: leases and beats of those who only stand there."""

SHORT = 0.02

PART = 125
"""Requests of a call: near the most that are allowed, and whole for workers that hold five each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSizes:
    """``queued`` requests wait; a tenth as many retries, a twentieth leases, a hundredth workers stand beside them."""

    queued: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    expired: tuple[int, ...] = (0, 10, 1_000)
    times: int = 21
    seconds: float = 900.0
    """Filling up to one size ends after so long; the size that was reached is told."""


QUICK = ScaleSizes(queued=(1_000, 10_000), times=11, seconds=60.0)
SMOKE = ScaleSizes(queued=(200, 400), expired=(0, 10), times=3, seconds=20.0)


@dataclass(slots=True)
class Population:
    """What stands on the server."""

    queued: int = 0
    retries: int = 0
    leases: int = 0
    workers: list[str] = field(default_factory=list)


class ScaleBenchmark:
    """Fills, measures, fills on."""

    def __init__(self, stage: Stage, sizes: ScaleSizes, say: Callable[[str], None]) -> None:
        self.stage, self.sizes, self.say = stage, sizes, say
        connection = stage.connection
        self.patient = Store(
            connection,
            Settings(step_timeout=LONG, heartbeat_timeout=LONG, retry_base=LONG, retry_cap=LONG),
        )
        self.hasty = Store(connection, Settings(step_timeout=SHORT, heartbeat_timeout=LONG))
        # A pulse that stays valid between two of our sweeps; after the first one nobody is judged for half a second.
        self.reaper = Store(connection, Settings(heartbeat=0.1, heartbeat_timeout=0.5, reap_interval=60.0))
        self.there = Population()

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        rows = []
        self.stage.clear()
        self.sweep()
        time.sleep(0.7)
        for queued in self.sizes.queued:
            began = time.monotonic()
            complete = self._fill(queued, began + self.sizes.seconds)
            self.say(f"{self.there.queued:,} waiting after {time.monotonic() - began:.0f} s")
            costs = {name: self._cost(operation) for name, operation in self._operations()}
            for expired in self.sizes.expired:
                costs[f"sweep, {expired:,} expired"] = self._sweep_cost(expired)
            rows.append({
                "queued": self.there.queued, "retries": self.there.retries, "leases": self.there.leases,
                "workers": len(self.there.workers), "costs": costs,
            })  # fmt: skip
            if not complete:
                break
        return {"sizes": asdict(self.sizes), "rows": rows}

    # --- filling ---------------------------------------------------------------------------------------

    def _fill(self, queued: int, until: float) -> bool:
        there = self.there
        for _ in range(queued // 100 - len(there.workers)):
            there.workers.append(self._worker())
        for held in self._in_parts(queued // 20 - there.leases, HELD, until):
            there.leases += self._hold(held)
        for number in self._in_parts(queued // 10 - there.retries, FAILING, until):
            there.retries += self._retry(number)
        for number in self._in_parts(queued - there.queued, WAITING, until):
            there.queued += number
        return there.queued == queued

    def _in_parts(self, number: int, queue: str, until: float) -> Iterator[int]:
        """Enqueue so many in calls of the largest size, and say after each how many it were."""
        while number > 0 and time.monotonic() < until:
            part = min(number, PART)
            self.enqueue(queue, part)
            yield part
            number -= part

    def enqueue(self, queue: str, number: int) -> list[str]:
        """Put requests in; their ids."""
        payload = pack({"n": 1, "text": "." * 180}, limit=10_000, what="payload")
        requests = [
            NewRequest(
                id=(identifier := new_id()),
                nonce=identifier,
                queue=queue,
                task=TASK,
                payload=payload,
                max_retries=3,
                result_ttl=86_400,
                failure_ttl=604_800,
                description=TASK,
            )
            for _ in range(number)
        ]
        if set(self.patient.enqueue(requests)) != {"accepted"}:
            raise BenchmarkFailed(f"the queue {queue} did not take what was put in")
        return [request.id for request in requests]

    def _worker(self) -> str:
        incarnation = new_id()
        self._beat(incarnation)
        return incarnation

    def _beat(self, incarnation: str) -> None:
        self.patient.heartbeat(
            incarnation=incarnation, worker=incarnation, queues=[WAITING], pid=1, host="simulated", device="none"
        )

    def _claim(self, store: Store, queue: str, number: int, incarnation: str) -> list[tuple[str, str]]:
        found = store.claim(
            incarnation=incarnation,
            worker=incarnation,
            queues=[queue],
            task="",
            free=number,
            slots={TASK: number},
            known=[],
        )
        if len(found.claims) != number:
            raise BenchmarkFailed(f"claimed {len(found.claims)} of {number} from {queue}: {found.status}")
        return [(claim.id, claim.execution) for claim in found.claims]

    def _take(self, number: int, incarnation: str) -> tuple[str, list[tuple[str, str]]]:
        return incarnation, self._claim(self.patient, WAITING, number, incarnation)

    def _hold(self, number: int) -> int:
        """Five for each worker, as far as there are workers."""
        left = number
        while left > 0:
            part = min(5, left)
            turn = (self.there.leases + number - left) // 5 % max(1, len(self.there.workers))
            self._claim(self.patient, HELD, part, self.there.workers[turn])
            left -= part
        return number

    def _retry(self, number: int) -> int:
        incarnation = self._worker()
        claimed = self._claim(self.patient, FAILING, number, incarnation)
        failures = [
            Failure(
                id=identifier,
                execution=execution,
                kind=FailureKind.UNKNOWN,
                reason="to be retried",
                traceback="",
                charge=True,
                crash=False,
                loss=False,
                retry=True,
            )
            for identifier, execution in claimed
        ]
        self.patient.fail(incarnation, incarnation, failures)
        return number

    # --- measuring -------------------------------------------------------------------------------------

    def _operations(self) -> Sequence[tuple[str, Callable[[], object]]]:
        client = Client(connection=self.stage.connection, settings=Settings())
        # One that holds nothing: what a worker has and does not name is given to it again.
        worker = self._worker()
        return [
            ("claim 1", partial(self._take, 1, worker)),
            ("claim 32", partial(self._take, 32, worker)),
            ("heartbeat", partial(self._beat, self.there.workers[len(self.there.workers) // 2])),
            ("list, 50", partial(client.list, limit=50)),
            ("list queued, 50", partial(client.list, status="queued", queue=WAITING, limit=50)),
        ]

    def _cost(self, operation: Callable[[], object], times: int = 0) -> dict[str, float]:
        """Medians: milliseconds here, microseconds in the server."""
        self._undo(operation())
        walls: list[float] = []
        servers: list[float] = []
        calls: list[float] = []
        for _ in range(times or self.sizes.times):
            self.stage.connection.config_resetstat()
            began = time.perf_counter()
            done = operation()
            walls.append((time.perf_counter() - began) * 1000)
            _count(self.stage.commands(), servers, calls)
            self._undo(done)
        return _medians(walls, servers, calls)

    def _undo(self, done: object) -> None:
        """Give back what was claimed, in the order that it had."""
        if isinstance(done, tuple):
            incarnation, claimed = done
            self.patient.release(incarnation, incarnation, claimed, reason="measured")

    def _sweep_cost(self, expired: int) -> dict[str, float]:
        """The cost of a sweep that finds so many expired leases, each of which it takes."""
        walls: list[float] = []
        servers: list[float] = []
        calls: list[float] = []
        for _ in range(self.sizes.times if expired < 100 else 5):
            late: list[str] = []
            for _ in self._in_parts(expired, LATE, time.monotonic() + 60):
                pass
            while len(late) < expired:
                part = min(MAX_REQUESTS, expired - len(late))
                late += [identifier for identifier, _ in self._claim(self.hasty, LATE, part, self._worker())]
            time.sleep(2 * SHORT if expired else 0)
            self.stage.connection.config_resetstat()
            began = time.perf_counter()
            taken = self.sweep()
            walls.append((time.perf_counter() - began) * 1000)
            _count(self.stage.commands(), servers, calls)
            if taken != expired:
                raise BenchmarkFailed(f"a sweep took {taken} requests instead of {expired}")
            self.forget(late)
        return _medians(walls, servers, calls)

    def sweep(self) -> int:
        """The part of a reaper's round that judges; how many requests it has taken."""
        queues = (WAITING, HELD, FAILING, LATE)
        taken = 0
        while True:
            swept = self.reaper.reap(queues, kind=FailureKind.WORKER_LOST, reason="no heartbeat")
            number = sum(1 for item in swept.reaped if item.id)
            taken += number
            # A full call may have left something behind without saying so.
            if not swept.left and number < MAX_REQUESTS:
                return taken

    def forget(self, identifiers: Sequence[str]) -> None:
        """End what a sweep has taken, so that the next one finds its own only."""
        for first in range(0, len(identifiers), MAX_REQUESTS):
            rows = [(identifier, "") for identifier in identifiers[first : first + MAX_REQUESTS]]
            self.patient.cancel(rows, reason="measured")


def _count(commands: dict[str, tuple[int, int]], times: list[float], calls: list[float]) -> None:
    """What the commands took in microseconds (those of a script are in the script's time) and how many they were."""
    known = {name: row for name, row in commands.items() if not name.startswith(("config", "info"))}
    scripts = [usec for name, (_, usec) in known.items() if name in ("evalsha", "eval")]
    times.append(sum(scripts) if scripts else sum(usec for _, usec in known.values()))
    calls.append(sum(number for number, _ in known.values()))


def _medians(walls: list[float], servers: list[float], calls: list[float]) -> dict[str, float]:
    return {
        "ms": statistics.median(walls),
        "redis_us": statistics.median(servers),
        "commands": statistics.median(calls),
    }
