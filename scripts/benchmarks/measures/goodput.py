"""The part ``goodput``: how much of the workers' time ends up in answers, against how often they die.

So many requests are always in flight, each on a worker of its own; every worker that runs one is killed at random,
with an exponential time between failures, and warm ones stand by. Once checkpoints are resumed, once every request
begins again from zero (``PERDURE_RESUME=0``); nothing else differs. Times are those of the issue divided by ``scale``,
told with the figures: what is lost by a kill in seconds (detection) is not scaled, so a smaller scale is kinder to us.

The closed form: with failures at rate λ, work T, a checkpoint every τ that costs c, and d seconds from a kill to
the next step, a request takes (e^λT − 1)(1/λ + d) from zero, and (T/τ)(e^λ(τ+c) − 1)/λ + λTd with checkpoints.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ....producer import Client, Handle
from ....protocol.settings import Settings
from ..figures import median
from ..processes import BenchmarkFailed, BenchProcess, Crew, wait_for
from ..stage import Stage
from ..systems import QUEUE
from .recovery import Notes

STEP = 0.05
SPARE = 2
"""Workers that stand by: a new one needs a second to start."""

INTERVAL = 0.1
"""Seconds between checkpoints: the default."""

# A request that loses its worker again and again without progress is taken for the culprit; here it never is.
_PATIENT = {
    "PERDURE_MAX_CRASHES": "1000000", "PERDURE_MAX_CRASHES_TOTAL": "1000000", "PERDURE_MAX_EXECUTIONS": "1000000",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputSizes:
    """``work`` and ``mtbf`` in seconds before they are divided by ``scale``; ``seconds`` is the time of one point."""

    scale: float = 3.0
    work: float = 30.0
    mtbf: tuple[float, ...] = (10.0, 30.0, 100.0)
    flight: int = 2
    seconds: float = 180.0


QUICK = GoodputSizes(scale=10.0, mtbf=(30.0,), seconds=15.0)
SMOKE = GoodputSizes(scale=30.0, mtbf=(30.0,), flight=1, seconds=3.0)


def from_zero(rate: float, work: float, delay: float) -> float:
    """Expected seconds of a request that begins again after every failure."""
    return (math.exp(rate * work) - 1) * (1 / rate + delay)


def resumed(rate: float, work: float, delay: float, interval: float = INTERVAL, cost: float = 0.0) -> float:
    """Expected seconds of one that goes on from its last checkpoint."""
    return work / interval * (math.exp(rate * (interval + cost)) - 1) / rate + rate * work * delay


@dataclass(slots=True)
class Running:
    """One place in the flight: its request, and when its worker is to die."""

    handle: Handle
    name: str
    due: float


class GoodputBenchmark:
    """One point after another: each time between failures, with checkpoints and without."""

    def __init__(self, stage: Stage, crew: Crew, sizes: GoodputSizes, say: Callable[[str], None]) -> None:
        self.stage, self.crew, self.sizes, self.say = stage, crew, sizes, say
        self.random = random.Random(11)

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        points = []
        for mtbf in self.sizes.mtbf:
            for resume in (True, False):
                point = self.measure(mtbf / self.sizes.scale, resume) | {"mtbf": mtbf}
                points.append(point)
                way = "resumed" if resume else "from zero"
                self.say(f"MTBF {mtbf:g} s, {way}: goodput {point['goodput']:.2f} of {point['closed_form']:.2f}")
        return {"sizes": asdict(self.sizes), "points": points}

    def measure(self, mtbf: float, resume: bool) -> dict[str, Any]:
        """One point; ``mtbf`` as it is here."""
        self.stage.clear()
        sizes = self.sizes
        work = sizes.work / sizes.scale
        notes = Notes(self.crew.folder / f"goodput-{time.monotonic_ns()}.notes")
        variables = {"BENCH_NOTES": str(notes.path), "PERDURE_RESUME": str(int(resume)), **_PATIENT}

        def start(*arguments: str) -> BenchProcess:
            return self.crew.start([sys.executable, "-P", *arguments], self.stage.url, "goodput", **variables)

        def start_worker() -> BenchProcess:
            return start("-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--quiet", QUEUE)

        children = [start("-m", "perdure.recovery")]
        workers = {child.pid: child for child in (start_worker() for _ in range(sizes.flight + SPARE))}
        finished = kills = 0
        delays: list[float] = []
        try:
            with Client(self.stage.url, settings=Settings()) as client:
                number = 0

                def submit() -> Running:
                    nonlocal number
                    number += 1
                    payload: dict[str, Any] = {"name": f"good-{number}", "steps": round(work / STEP), "seconds": STEP}
                    handle = client.submit("bench_perdure.walk", payload, queue=QUEUE)
                    return Running(handle, payload["name"], math.inf)

                flight = [submit() for _ in range(sizes.flight)]
                wait_for("the first steps", lambda: all(notes.of(place.name) for place in flight), 90)
                began = time.monotonic()
                progress = sum(len({note[1] for note in notes.of(place.name)}) for place in flight)
                while (now := time.monotonic()) - began < sizes.seconds:
                    for index, place in enumerate(flight):
                        seen = notes.of(place.name)
                        if seen and place.due == math.inf:
                            place.due = now + self.random.expovariate(1 / mtbf)
                        if seen and seen[-1][1] == round(work / STEP) - 1:
                            if place.handle.result(60) != round(work / STEP):
                                raise BenchmarkFailed(f"{place.name} has a wrong result")
                            finished += 1
                            flight[index] = submit()
                        elif now >= place.due:
                            kills += self._kill(seen[-1][0], workers)
                            place.due = math.inf
                            victim, since = seen[-1][0], time.monotonic()
                            wait = _until_another(notes, place.name, victim, since, round(work / STEP) - 1)
                            # Others are in flight meanwhile; one of them that is due dies a little later.
                            delays += [wait] if wait is not None else []
                    while len(workers) < sizes.flight + SPARE:
                        child = start_worker()
                        workers[child.pid] = child
                    time.sleep(0.01)
                seconds = time.monotonic() - began
                # The first steps were taken before the clock began, and the last requests have not ended.
                useful = finished * work + (self._kept(notes, flight) - progress) * STEP if resume else finished * work
        finally:
            self.crew.stop(*children, *workers.values(), at_once=True)
        delay = median(delays) or 0.0
        expected = (resumed if resume else from_zero)(1 / mtbf, work, delay)
        return {
            "resume": resume, "finished": finished, "kills": kills, "seconds": seconds, "delay_ms": delay * 1000,
            "goodput": useful / (sizes.flight * seconds), "closed_form": work / expected,
        }  # fmt: skip

    def _kill(self, pid: int, workers: dict[int, BenchProcess]) -> int:
        child = workers.pop(pid, None)
        if child is None:
            return 0
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        child.process.wait()
        self.crew.children.remove(child)
        return 1

    @staticmethod
    def _kept(notes: Notes, flight: list[Running]) -> int:
        """Steps of those still in flight that need not be taken again."""
        return sum(len({note[1] for note in notes.of(place.name)}) for place in flight)


def _until_another(
    notes: Notes, name: str, victim: int, since: float, last: int, patience: float = 60.0
) -> float | None:
    """Seconds until another process takes a step of it; ``None`` if its ``last`` was taken before the kill."""
    deadline = since + patience
    while time.monotonic() < deadline:
        seen = notes.of(name)
        for pid, _, at, _ in reversed(seen):
            if pid != victim and at > since:
                return at - since
        if seen[-1][1] == last:
            return None
        time.sleep(0.005)
    return None
