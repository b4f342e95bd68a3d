"""The part ``queue``: what a no-op request of 200 bytes costs, with Perdure and with others.

In each round every system, one after another, on an empty server: requests are put in one by one and in bulk; one
worker process, then two, take them out; all results are read back and compared; then the time from submit to result,
each submitted after the last result, after half a second of nothing, and beside half the load that the worker bears.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..figures import Series, median, percentile
from ..processes import BenchmarkFailed, BenchProcess, Crew, PeerProcess
from ..stage import Stage
from ..systems import System
from .drains import judge, watch

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSizes:
    """How much is measured. ``limit`` and ``latency_limit`` are seconds that one drain, one series may take."""

    rounds: int = 5
    requests: int = 20_000
    one_by_one: int = 4_000
    workers: tuple[int, ...] = (1, 2)
    limit: float = 30.0
    latencies: int = 300
    idle: int = 15
    latency_limit: float = 8.0
    load: float = 4.0
    """Seconds of latency under half load."""
    stock: int = 1_000
    """Requests for the memory of a server that is set up as it comes; for ours and RQ's, 0 for none."""
    budget: float = 0.0
    """Seconds after which nothing more begins once the first round is complete; 0 is no limit."""


QUICK = QueueSizes(
    rounds=5,
    requests=4_000,
    one_by_one=500,
    workers=(1,),
    limit=2.0,
    latencies=100,
    idle=0,
    latency_limit=1.0,
    load=0.0,
    stock=0,
    budget=24.0,
)
SMOKE = QueueSizes(
    rounds=1,
    requests=300,
    one_by_one=20,
    workers=(1,),
    limit=0.5,
    latencies=5,
    idle=1,
    latency_limit=0.5,
    load=0.2,
    stock=50,
)

WARM_UP = 20
LOST = 0.01
"""The part of a peer's results that may be wrong or missing."""

ON_STOCK = ("perdure", "rq SimpleWorker")
STOCK = {"stream-node-max-bytes": 4096, "hash-max-ziplist-value": 64}
"""As a server comes."""
PAUSE = 0.5
"""Seconds of idling before a submit."""


class QueueBenchmark:
    """Measures the given systems in turn; what fails in one of them is told, and leaves the others alone."""

    def __init__(
        self,
        stage: Stage,
        crew: Crew,
        systems: Sequence[tuple[System, str]],
        sizes: QueueSizes,
        say: Callable[[str], None],
    ) -> None:
        self.stage, self.crew, self.systems, self.sizes, self.say = stage, crew, systems, sizes, say
        self.series = Series()
        self.problems: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """All rounds; the figures as they go into the JSON file."""
        began = time.monotonic()
        for number in range(1, self.sizes.rounds + 1):
            for system, python in self.systems:
                over = self.sizes.budget and number > 1 and time.monotonic() - began > self.sizes.budget
                if system.name in self.problems or over:
                    continue
                try:
                    found = self.measure(system, python)
                except BenchmarkFailed as error:
                    self.problems[system.name] = str(error)
                    self.say(f"round {number}: {system.name}: FAILED: {error}")
                    self.crew.stop(at_once=True)
                    continue
                self.series.add(system.name, found)
                self.say(f"round {number}: {system.name}: {found['drain_1']:,.0f}/s drained by one worker")
        return {
            "sizes": asdict(self.sizes),
            "systems": {system.name: system.how for system, _ in self.systems},
            "problems": self.problems,
            **self.series.to_json(),
        }

    def measure(self, system: System, python: str) -> Figures:
        """One system in one round."""
        with self._producer(system, python) as agent:
            found = self._one_by_one(agent)
            for workers in reversed(self.sizes.workers):
                # One worker comes last: its latency is measured where it is.
                part = self._throughput(system, python, agent, workers)
                part["wrong"] = (part["wrong"] or 0) + (found.get("wrong") or 0)
                found |= part
            if self.sizes.stock and system.name.startswith(ON_STOCK):
                found |= self._on_stock(system, python, agent)
        return found

    def _on_stock(self, system: System, python: str, agent: PeerProcess) -> Figures:
        """Memory of a request on a server as it comes: each entry of a stream, which is how RQ keeps results, takes 4
        KB, and a hash with a longer value is none that is compact.
        """
        ask = self.stage.connection
        before = {name: ask.config_get(name)[name] or 0 for name in STOCK}
        for name, value in STOCK.items():
            ask.config_set(name, value)
        try:
            self._open(agent)
            empty, count = self.stage.memory(), self.sizes.stock
            agent.ask(600, do="bulk", number=count)
            queued = (self.stage.memory() - empty) / count
            with self._workers(system, python, 1) as children:
                watch(self.stage, partial(system.done, submitted=count), count, 10 * self.sizes.limit, children)
                done = system.done(self.stage.connection, count)
                finished = (self.stage.memory() - empty) / done if done == count else None
                return {"bytes_queued_stock": queued, "bytes_finished_stock": finished}
        finally:
            for name, own in before.items():
                ask.config_set(name, own)

    def _one_by_one(self, agent: PeerProcess) -> Figures:
        if not self._open(agent):
            return {}  # the drain's submits will tell
        count = self.sizes.one_by_one
        return {"submit": count / agent.ask(600, do="submit", number=count)["seconds"]}

    def _throughput(self, system: System, python: str, agent: PeerProcess, number: int) -> Figures:
        bulk = self._open(agent)
        found: Figures = {}
        empty = self.stage.memory()
        count = self.sizes.requests
        seconds = agent.ask(600, do="bulk" if bulk else "submit", number=count)["seconds"]
        queued = (self.stage.memory() - empty) / count
        with self._workers(system, python, number) as children:
            samples = watch(self.stage, partial(system.done, submitted=count), count, self.sizes.limit, children)
            drain = judge(samples)
            found[f"drain_{number}"] = drain.rate
            if number == 1:
                found["bulk" if bulk else "submit"] = count / seconds
                found["bytes_queued"] = queued
                # Of those that have ended; what still waits takes what it took before.
                waiting = (count - drain.done) * queued
                found["bytes_finished"] = (self.stage.memory() - empty - waiting) / drain.done
                found["cpu_us"], found["round_trips"] = drain.cpu_us, drain.round_trips
            # All of them once; later rounds read every tenth, for it takes longer than the drain.
            every = 1 if system.name not in self.series.rounds else 10
            checked = agent.ask(600, do="check", number=drain.done, every=every)
            found["wrong"] = checked["wrong"]
            # A peer that loses a request now and then is measured all the same, and the loss is told.
            if checked["wrong"] > (0 if system.name.startswith("perdure") else LOST * checked["checked"]):
                raise BenchmarkFailed(f"{checked['wrong']} wrong results, such as {checked['examples']}")
            if number == 1 and drain.done == count:
                found |= self._latencies(system, python, agent, drain.rate)
        if number == 1 and drain.done < count:
            # What still waits would stand in the way.
            self._open(agent)
            with self._workers(system, python, 1):
                found |= self._latencies(system, python, agent, drain.rate)
        return found

    def _latencies(self, system: System, python: str, agent: PeerProcess, capacity: float) -> Figures:
        found: Figures = {}
        limit = self.sizes.latency_limit
        # The first one may wait for the worker to start.
        agent.ask(90, do="latency", number=WARM_UP, pause=0, seconds=limit)
        for name, number, pause in (("latency", self.sizes.latencies, 0.0), ("idle", self.sizes.idle, PAUSE)):
            if number:
                times = agent.ask(90, do="latency", number=number, pause=pause, seconds=limit)["ms"]
                found |= {f"{name}_p50": percentile(times, 0.5), f"{name}_p99": percentile(times, 0.99)}
        if not self.sizes.load:
            return found
        with self._producer(system, python) as other:
            other.ask(60, do="open", url=self.stage.url)
            other.tell(do="load", rate=capacity / 2, seconds=self.sizes.load + 1.0)
            times = agent.ask(90, do="latency", number=10**6, pause=0, seconds=self.sizes.load)["ms"]
            reached = other.hear(90)
        return found | {
            "load_p50": percentile(times, 0.5),
            "load_p99": percentile(times, 0.99),
            "load_rate": reached["submitted"] / reached["seconds"],
        }

    # --- processes -------------------------------------------------------------------------------------

    def _open(self, agent: PeerProcess) -> bool:
        """A producer on an empty server, which knows nothing of what was cleared away. Has it a call for many?"""
        self.stage.clear()
        return bool(agent.ask(60, do="open", url=self.stage.url)["bulk"])

    @contextmanager
    def _producer(self, system: System, python: str) -> Iterator[PeerProcess]:
        agent = self.crew.agent([python, *system.producer], self.stage.url, _slug(system), **system.variables)
        try:
            yield agent
        finally:
            self.crew.stop(agent, at_once=True)

    @contextmanager
    def _workers(self, system: System, python: str, number: int) -> Iterator[list[BenchProcess]]:
        children = [
            self.crew.start([python, *system.worker], self.stage.url, _slug(system), **system.variables)
            for _ in range(number)
        ]
        try:
            yield children
        finally:
            self.crew.stop(*children)


def ratios(series: Series, own: str = "perdure") -> Figures:
    """What is compared with the targets: medians of the ratios of each round, in which both met the same machine."""
    rounds = series.rounds

    def against(figure: str, other: str, subject: str = own, of: str = "") -> float | None:
        mine = rounds.get(subject, {}).get(figure, [])
        theirs = rounds.get(other, {}).get(of or figure, [])
        return median(a / b for a, b in zip(mine, theirs, strict=False) if a is not None and b)

    peers = [name for name in rounds if not name.startswith((own, "bare"))]
    python_peers = [name for name in peers if name != "bullmq"]

    def least(figure: str, names: Sequence[str]) -> float | None:
        known = [value for name in names if (value := against(figure, name)) is not None]
        return min(known) if known else None

    def most(figure: str, names: Sequence[str]) -> float | None:
        known = [value for name in names if (value := against(figure, name)) is not None]
        return max(known) if known else None

    return {
        "drain_vs_rq_simpleworker": against("drain_1", "rq SimpleWorker"),
        "drain_task_vs_rq_simpleworker": against("drain_1", "rq SimpleWorker", f"{own} @task"),
        "drain_vs_best_python_peer": least("drain_1", python_peers),
        "drain_vs_bullmq": against("drain_1", "bullmq"),
        "two_workers_vs_one": against("drain_2", own, of="drain_1"),
        "two_workers_vs_best_python_peer": least("drain_2", python_peers),
        "submit_vs_bare_evalsha": against("submit", "bare loop (one by one)"),
        "bulk_vs_rq": against("bulk", "rq SimpleWorker"),
        "bulk_vs_bullmq": against("bulk", "bullmq"),
        "latency_p50_vs_best_peer": most("latency_p50", peers),
        "idle_p50_vs_best_peer": most("idle_p50", peers),
        "bytes_queued_vs_rq": against("bytes_queued", "rq SimpleWorker"),
        "bytes_finished_vs_rq": against("bytes_finished", "rq SimpleWorker"),
        "bytes_queued_stock_vs_rq": against("bytes_queued_stock", "rq SimpleWorker"),
        "bytes_finished_stock_vs_rq": against("bytes_finished_stock", "rq SimpleWorker"),
        "cpu_vs_rq": against("cpu_us", "rq SimpleWorker"),
        "round_trips_vs_rq": against("round_trips", "rq SimpleWorker"),
    }


def _slug(system: System) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in system.name)
