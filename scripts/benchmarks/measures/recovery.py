"""The part ``recovery``: from a kill to the next step elsewhere, and how many steps are taken twice.

Two workers; one request of steps of 20 ms; when it has taken so many, what runs it is killed (its process alone, or
with all that belongs to it), or hangs with the interpreter's lock held. Steps are noted on disk (peers/notes.py),
which gives both figures without asking any system. Between two kills both workers have shown that they run.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ..figures import median, percentile
from ..processes import BenchmarkFailed, BenchProcess, Crew, PeerProcess, wait_for
from ..stage import Stage

STEP = 0.02
WARM_UP_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySizes:
    """``at``: the step of a kill, give or take ``around``; ``seconds``: after which no further kill begins."""

    kills: int = 50
    at: int = 100
    around: int = 10
    rest: int = 30
    seconds: float = 540.0
    patience: float = 120.0


QUICK = RecoverySizes(kills=5, at=20, around=5, rest=10, seconds=40.0, patience=20.0)
SMOKE = RecoverySizes(kills=1, at=10, around=2, rest=10, seconds=1.0, patience=20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is killed how. ``kind``: ``worker`` (the process that steps), ``tree``, ``hang``."""

    name: str
    kind: str
    producer: Sequence[str]
    worker: Sequence[str]
    how: str
    reaper: Sequence[str] = ()
    environment: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    most: int = 1_000_000


@dataclass(slots=True)
class KillFigures:
    """One kill: seconds until the next step elsewhere, and steps that were taken more than once."""

    seconds: float
    repeated: int


class Notes:
    """What the workers have noted: name -> (pid, step, seconds, what)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[tuple[int, int, float, str]]] = defaultdict(list)
        self._read = 0

    def of(self, name: str) -> list[tuple[int, int, float, str]]:
        """All notes of one request so far."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.decode().splitlines():
                subject, pid, step, at, what = line.split()
                self.found[subject].append((int(pid), int(step), int(at) / 1e9, what))
        return self.found[name]


class RecoveryBenchmark:
    """One scenario after another; a failure in one leaves the others alone."""

    def __init__(self, stage: Stage, crew: Crew, sizes: RecoverySizes, say: Callable[[str], None]) -> None:
        self.stage, self.crew, self.sizes, self.say = stage, crew, sizes, say
        self.random = random.Random(7)

    def run(self, scenarios: Sequence[tuple[Scenario, str]]) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        medians: dict[str, dict[str, Any]] = {}
        problems: dict[str, str] = {}
        for scenario, python in scenarios:
            try:
                kills = self.measure(scenario, python)
            except BenchmarkFailed as error:
                problems[scenario.name] = str(error)
                self.say(f"{scenario.name}: FAILED: {error}")
                self.crew.stop(at_once=True)
                continue
            times = [kill.seconds * 1000 for kill in kills]
            medians[scenario.name] = {
                "kills": len(kills),
                "p50_ms": percentile(times, 0.5),
                "p99_ms": percentile(times, 0.99),
                "repeated": median(float(kill.repeated) for kill in kills),
                "repeated_most": max(kill.repeated for kill in kills),
                "each_ms": [round(value, 1) for value in times],
            }
            self.say(f"{scenario.name}: {len(kills)} kills, next step elsewhere after {median(times):,.0f} ms (p50)")
        return {
            "sizes": asdict(self.sizes),
            "systems": {scenario.name: scenario.how for scenario, _ in scenarios},
            "medians": medians,
            "problems": problems,
        }

    def measure(self, scenario: Scenario, python: str) -> list[KillFigures]:
        """All kills of one scenario."""
        self.stage.clear()
        place = "".join(letter if letter.isalnum() else "-" for letter in scenario.name)
        notes = Notes(self.crew.folder / f"{place}.notes")
        variables = {**scenario.variables, "BENCH_NOTES": str(notes.path)}

        def start(arguments: Sequence[str]) -> BenchProcess:
            return self.crew.start([python, *arguments], self.stage.url, place, **variables)

        agent = self.crew.agent([python, *scenario.producer], self.stage.url, place, **variables)
        agent.ask(60, do="open", url=self.stage.url)
        reapers = [start(scenario.reaper)] if scenario.reaper else []
        workers = [start(scenario.worker) for _ in range(2)]
        kills: list[KillFigures] = []
        began = time.monotonic()
        number = min(self.sizes.kills, scenario.most)
        try:
            while len(kills) < number and (not kills or time.monotonic() - began < self.sizes.seconds):
                self._warm(agent, notes, workers, len(kills))
                kills.append(self._kill(scenario, agent, notes, workers, len(kills)))
                workers = [worker for worker in workers if worker.running]
                workers += [start(scenario.worker) for _ in range(2 - len(workers))]
        finally:
            self.crew.stop(agent, *reapers, *workers, at_once=True)
        return kills

    def _warm(self, agent: PeerProcess, notes: Notes, workers: Sequence[BenchProcess], number: int) -> None:
        """Short walks, two at a time, until two processes have taken steps of them."""
        deadline = time.monotonic() + 60
        for turn in range(10_000):
            names = [f"warm-{number}-{turn}-{place}" for place in (0, 1)]
            agent.ask(60, do="walk", payloads=[_payload(name, WARM_UP_STEPS) for name in names])
            wait_for("the walks of a warm-up", partial(_done, notes, names), 60, workers)
            if len({pid for name in names for pid, _, _, _ in notes.of(name)}) > 1:
                return
            if time.monotonic() > deadline:
                raise BenchmarkFailed("one worker alone takes all requests")

    def _kill(
        self, scenario: Scenario, agent: PeerProcess, notes: Notes, workers: Sequence[BenchProcess], number: int
    ) -> KillFigures:
        name = f"walk-{number}"
        at = self.sizes.at + self.random.randint(-self.sizes.around, self.sizes.around)
        total = at + self.sizes.rest
        payload = _payload(name, total)
        if scenario.kind == "hang":
            payload["hang"] = at
        agent.ask(60, do="walk", payloads=[payload])
        if scenario.kind == "hang":
            wait_for("the hang", lambda: any(note[3] == "hang" for note in notes.of(name)), 60, workers)
            victim, _, when, _ = next(note for note in notes.of(name) if note[3] == "hang")
        else:
            wait_for(f"step {at}", lambda: any(note[1] >= at for note in notes.of(name)), 60, workers)
            victim = notes.of(name)[-1][0]
            # A part of a step more: a kill is not in step with what it kills.
            time.sleep(self.random.uniform(0, STEP))
            when = time.monotonic()
            _end(scenario.kind, victim, workers)

        def others() -> list[tuple[int, int, float, str]]:
            return [note for note in notes.of(name) if note[0] != victim and note[3] == "step"]

        wait_for("the next step elsewhere", lambda: bool(others()), self.sizes.patience)
        following = others()[0][2]
        if scenario.kind == "hang":
            _end("tree", victim, workers)
        wait_for("the last step", lambda: any(note[1] == total - 1 for note in notes.of(name)), 60)
        (result,) = agent.ask(60, do="ended")["results"]
        if result != total:
            raise BenchmarkFailed(f"{name} ended with {result!r}, not {total}")
        taken = [note[1] for note in notes.of(name) if note[3] == "step"]
        if sorted(set(taken)) != list(range(total)):
            raise BenchmarkFailed(f"{name}: steps are missing: {sorted(set(range(total)) - set(taken))[:5]}")
        return KillFigures(following - when, len(taken) - len(set(taken)))


def _payload(name: str, steps: int) -> dict[str, Any]:
    return {"name": name, "steps": steps, "seconds": STEP}


def _done(notes: Notes, names: Sequence[str]) -> bool:
    return all(any(note[1] == WARM_UP_STEPS - 1 for note in notes.of(name)) for name in names)


def _end(kind: str, victim: int, workers: Sequence[BenchProcess]) -> None:
    """SIGKILL: the process alone, or everything of the worker to which it belongs, the youngest first."""
    if kind == "worker":
        os.kill(victim, signal.SIGKILL)
        for worker in workers:
            if worker.pid == victim:
                worker.process.wait()
        return
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(worker.pid).children(recursive=True)
            if victim == worker.pid or any(child.pid == victim for child in family):
                # The guardian must not see its worker end: both are stopped before either is killed.
                for process in [*family, psutil.Process(worker.pid)]:
                    with suppress(psutil.NoSuchProcess):
                        process.suspend()
                for process in [*family, psutil.Process(worker.pid)]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                worker.process.wait()
                return
