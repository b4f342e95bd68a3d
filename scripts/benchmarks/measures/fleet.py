"""Of the part ``scale``: what many queue names and many idle workers cost, and the loss of many workers at once.

Workers are simulated by their calls. Redis' time is the processor time of its process, all that it does for its
connections included.
"""

from __future__ import annotations

import heapq
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from ....protocol.codec import pack_entry, unpack_entry
from ....protocol.connection import connect
from ....protocol.identities import new_id
from ....protocol.keys import crowd, key
from ....protocol.reading.output_log import Outputs
from ....protocol.settings import Settings
from ....protocol.store import Store
from ....protocol.transitions.heartbeats import refreshed
from ....recovery.reaper import Reaper
from ....workers.redis_io.claimer import LOOK, REST
from ..figures import Series, ratio
from ..processes import BenchmarkFailed
from ..stage import Stage

TASK: Final = "app.tasks.noop"
QUEUE: Final = "fleet"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSizes:
    """So many names; so many idle workers for so many seconds; so many workers that are lost, with what each holds."""

    names: tuple[int, ...] = (1, 10, 100, 1000)
    times: int = 200
    idle: tuple[int, ...] = (10, 100, 1000)
    seconds: float = 30.0
    outputs: int = 100_000
    """Of one request, each in an entry of its own."""
    lost: tuple[int, ...] = (100, 1000)
    held: int = 64


QUICK = FleetSizes(names=(1, 1000), times=50, idle=(100,), seconds=12.0, outputs=10_000, lost=(50,))
SMOKE = FleetSizes(names=(1, 20), times=3, idle=(4,), seconds=1.0, outputs=500, lost=(3,), held=5)


@dataclass(slots=True)
class Idle:
    """One idle worker: a connection of its guardian, one of its courier, and one that waits for its bell."""

    beats: Store
    claims: Store
    bell: Any
    incarnation: str
    refreshed: float = 0.0
    looks: bool = True

    def beat(self, settings: Settings) -> float:
        """Seconds until the next one."""
        now = time.monotonic()
        if now >= self.refreshed or not self.beats.beat(self.incarnation):
            self.beats.heartbeat(
                incarnation=self.incarnation, worker=self.incarnation, queues=[QUEUE], pid=1, host=self.incarnation
            )
            self.refreshed = now + refreshed(settings)
        return settings.heartbeat

    def look(self, bells: list[str]) -> float:
        """What waited is over; claim, look for notes as its threads do, and wait again."""
        self.bell.read_response()
        found = self.claims.claim(
            incarnation=self.incarnation, worker=self.incarnation, queues=[QUEUE], task="", free=1,
            slots={TASK: 8}, known=[], first_beat=60.0,
        )  # fmt: skip
        for notes in ("parents", "notices"):
            self.claims.connection.srandmember(key(notes), 100)
        self.looks = found.looks
        return self.wait(bells)

    def wait(self, bells: list[str]) -> float:
        """Ask Redis to be rung; seconds after which its answer is there."""
        seconds = LOOK if self.looks else REST
        self.bell.send_command("BLPOP", *bells, *([] if self.looks else [key("turn", crowd((QUEUE,)))]), 0.8 * seconds)
        return seconds


class FleetBenchmark:
    """Each figure on an empty server."""

    def __init__(self, stage: Stage, sizes: FleetSizes, enqueue: Callable[[str, int], object]) -> None:
        """``enqueue`` puts so many requests into a queue."""
        self.stage, self.sizes, self.enqueue = stage, sizes, enqueue
        self.settings = Settings()

    def run(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        sizes = self.sizes
        names = [{"names": number} | self._beside(number) for number in sizes.names]
        say(f"names: {names}")
        idle = [{"workers": number, "core": self._idle(number)} for number in sizes.idle]
        say(f"idle: {idle}")
        log = self._log(sizes.outputs)
        say(f"log: {log}")
        lost = [{"workers": number} | self._loss(number) for number in sizes.lost]
        say(f"lost: {lost}")
        return {"sizes": asdict(sizes), "names": names, "idle": idle, "log": log, "lost": lost}

    def _spent(self, what: Callable[[], object], times: int) -> float:
        """Microseconds of Redis for one."""
        what()
        before = self.stage.sample().cpu
        for _ in range(times):
            what()
        return 1e6 * (self.stage.sample().cpu - before) / times

    def _beside(self, number: int) -> dict[str, float]:
        """What an idle claim and a sweep cost beside so many queue names of which none holds anything."""
        self.stage.clear()
        store, names = Store(self.stage.connection, self.settings), [f"name-{place:06d}" for place in range(number)]
        incarnation = new_id()
        claim = self._spent(
            lambda: store.claim(
                incarnation=incarnation, worker="w", queues=names, task="", free=1, slots={TASK: 8}, known=[]
            ),
            self.sizes.times,
        )
        self.stage.connection.sadd(key("queues"), *(key("queue", name) for name in names))
        reaper = Reaper(store, self.settings)
        sweep = self._spent(lambda: reaper.sweep(expire=False), self.sizes.times)
        return {"claim_us": claim, "sweep_us": sweep}

    def _idle(self, number: int) -> float:
        """The share of a core that so many idle workers with one queue take, and a reaper."""
        self.stage.clear()
        bells = [key("bell", QUEUE)]
        workers = []
        for _ in range(number):
            stores = [Store(connect(self.stage.url, timeout=60.0, check=False), self.settings) for _ in range(3)]
            bell = stores[2].connection.connection_pool.get_connection()
            workers.append(Idle(stores[0], stores[1], bell, new_id()))
        reaper = Reaper(Store(self.stage.connection, self.settings), self.settings)
        now = time.monotonic()
        due: list[tuple[float, int, Callable[[], float]]] = []
        for place, worker in enumerate(workers):
            worker.looks = place == 0
            worker.wait(bells)
            beat, look = (lambda worker=worker: worker.beat(self.settings)), (lambda worker=worker: worker.look(bells))
            heapq.heappush(due, (now + random.uniform(0, self.settings.heartbeat), 3 * place, beat))
            heapq.heappush(due, (now + (LOOK if place == 0 else random.uniform(0.9, 1.9) * REST), 3 * place + 1, look))

        def sweep() -> float:
            reaper.sweep()
            return self.settings.reap_interval

        heapq.heappush(due, (now, -1, sweep))
        try:
            _play(due, now + REST)  # every whole heartbeat has its time, and every script is loaded
            began, before = time.monotonic(), self.stage.sample().cpu
            late = _play(due, began + self.sizes.seconds)
            spent = (self.stage.sample().cpu - before) / (time.monotonic() - began)
            if late > self.settings.heartbeat_timeout / 2:
                raise BenchmarkFailed(f"{number} idle workers were simulated {late:.1f} s too late")
            return spent
        finally:
            for worker in workers:
                worker.bell.disconnect()
                worker.beats.connection.close()
                worker.claims.connection.close()

    def _log(self, number: int) -> dict[str, Any]:
        """How long it takes to read so many outputs, as a claim does to go on from them, against decoding them alone;
        and how long the others of that worker wait at most. Medians, ms.
        """
        self.stage.clear()
        store = Store(self.stage.connection, self.settings)
        entries = [pack_entry(0, place, [f"word{place}"]) for place in range(number)]
        for first in range(0, number, 1000):
            store.connection.rpush(key("output", "long"), *entries[first : first + 1000])
        figures = Series()
        for _ in range(5):
            whole, longest, began = Outputs(), 0.0, time.perf_counter()
            while True:
                asked = time.perf_counter()
                more = whole.take(store.output_page("long", whole.place))
                longest = max(longest, time.perf_counter() - asked)
                if not more:
                    break
            read = time.perf_counter() - began
            if len(whole.values) != number:
                raise BenchmarkFailed(f"read {len(whole.values)} of {number} outputs")
            began = time.perf_counter()
            for entry in entries:
                unpack_entry(entry)
            decode = time.perf_counter() - began
            figures.add("log", {"read_ms": 1e3 * read, "decode_ms": 1e3 * decode, "longest_ms": 1e3 * longest})
        return {"outputs": number} | figures.medians()["log"]

    def _loss(self, number: int) -> dict[str, Any]:
        """So many workers are lost at once: how long a reaper takes until all requests wait again."""
        self.stage.clear()
        patient = Store(self.stage.connection, self.settings.replace(heartbeat_timeout=1e5, step_timeout=1e5))
        requests = number * self.sizes.held
        for first in range(0, requests, 100):
            self.enqueue(QUEUE, min(100, requests - first))
        for _ in range(number):
            incarnation = new_id()
            patient.heartbeat(incarnation=incarnation, worker=incarnation, queues=[QUEUE], pid=1, host=incarnation)
            found = patient.claim(
                incarnation=incarnation, worker=incarnation, queues=[QUEUE], task="", free=self.sizes.held,
                slots={TASK: self.sizes.held}, known=[],
            )  # fmt: skip
            if len(found.claims) != self.sizes.held:
                raise BenchmarkFailed(f"claimed {len(found.claims)} of {self.sizes.held}: {found.status}")
        logging.getLogger("perdure.reaper").setLevel(logging.CRITICAL)
        settings = Settings(heartbeat_timeout=0.5, heartbeat=0.1)
        reaper = Reaper(Store(self.stage.connection, settings), settings)
        connection = self.stage.connection
        beats: Any = connection.zrange(key("beats"), 0, -1)
        with connection.pipeline(transaction=False) as pipe:
            now = connection.time()
            ms = now[0] * 1000 + now[1] // 1000
            pipe.hset(key("pulse"), mapping={"at": ms, "since": ms - 60_000})
            for name in beats:
                pipe.zadd(key("beats"), {name: 1})
            pipe.execute()
        connection.config_set("slowlog-log-slower-than", 1000)
        connection.config_set("slowlog-max-len", 10_000)
        connection.slowlog_reset()
        began, before = time.monotonic(), self.stage.sample().cpu
        while connection.exists(key("leases", QUEUE)):
            reaper.sweep(expire=False)
        seconds, spent = time.monotonic() - began, self.stage.sample().cpu - before
        calls: Any = connection.slowlog_get(10_000)
        if connection.llen(key("queue", QUEUE)) + connection.zcard(key("suspects", QUEUE)) != requests:
            raise BenchmarkFailed("not all that were lost wait again")
        return {
            "requests": requests, "seconds": seconds, "core": spent / seconds,
            "longest_ms": max((call["duration"] / 1000 for call in calls), default=0.0),
        }  # fmt: skip


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """What the figures are held to."""
    names, lost = found["names"], found["lost"][-1]
    return {
        "claim_most_names_against_one": ratio(names[-1]["claim_us"], names[0]["claim_us"]),
        "sweep_most_names_against_one": ratio(names[-1]["sweep_us"], names[0]["sweep_us"]),
        "log_above_decoding_ms": found["log"]["read_ms"] - found["log"]["decode_ms"],
        "idle_pool_core": found["idle"][-1]["core"],
        "loss_seconds": lost["seconds"],
        "loss_core": lost["core"],
        "loss_longest_ms": lost["longest_ms"],
    }


def _play(due: list[tuple[float, int, Callable[[], float]]], until: float) -> float:
    """Call each when it is due, until then; returns by how much one was late at most."""
    late = 0.0
    while due[0][0] < until:
        at, place, call = heapq.heappop(due)
        time.sleep(max(0.0, at - time.monotonic()))
        late = max(late, time.monotonic() - at)
        heapq.heappush(due, (at + call(), place, call))
    return late
