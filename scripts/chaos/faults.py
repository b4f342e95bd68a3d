"""Faults of processes: killed, frozen, hung, crashed, and guests that come and go; and the table of all kinds."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final

import psutil
import redis
from rq.exceptions import NoSuchJobError
from rq.job import Job

from .crew import ChaosProcess, Target
from .journal import WITHDRAWN
from .load import BLEND, STEPS, TEXTS, WALK, Order, submit
from .outages import Busy, ClientKill, ClockStep, Full, Network, NoReplicas, RedisKill, RedisStop, ScriptFlush
from .schedule import Planned
from .stage import Fault, FaultTargets
from .tasks import LACKS, MODEL, OTHER


class KillWorker(Fault):
    """SIGKILL of the worker alone: its guardian sees it."""

    def fire(self, stage: FaultTargets) -> bool:
        target = stage.victim(self.planned.choice)
        if target is None:
            return False
        held = stage.executions(target)
        for process in self._processes(target):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return self._fired(held, target.name)

    def _processes(self, target: Target) -> list[psutil.Process]:
        return [target.process]


class KillTree(KillWorker):
    """The guardians first, so that they see nothing."""

    def _processes(self, target: Target) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [*target.process.children(recursive=True), target.process]
        return []


class KillGuardian(Fault):
    def fire(self, stage: FaultTargets) -> bool:
        target = stage.victim(self.planned.choice)
        if target is None or not target.guardians:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            target.guardians[0].kill()
        return self._fired(note=target.name)


class KillMember(Fault):
    """SIGKILL of a supervisor or a producer; the crew starts another."""

    def fire(self, stage: FaultTargets) -> bool:
        crew = stage.crew
        members = crew.producers
        if self.planned.kind == "kill_supervisor":
            members = [member for member in crew.supervisors if not (stage.late and member.name == TEXTS)]
        member = members[int(self.planned.choice * len(members))]
        if not member.running:
            return False
        member.process.kill()
        return self._fired(note=member.name)


class KillReaper(Fault):
    def fire(self, stage: FaultTargets) -> bool:
        reapers = stage.crew.reapers()
        if not reapers:
            return False
        reapers[int(self.planned.choice * len(reapers))].kill()
        return self._fired()


class Freeze(Fault):
    """SIGSTOP of processes, SIGCONT when the time is over."""

    def __init__(self, planned: Planned, number: int) -> None:
        super().__init__(planned, number)
        self._frozen: list[psutil.Process] = []

    def heal(self, stage: FaultTargets) -> bool:
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: FaultTargets) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    def _freeze(self, processes: list[psutil.Process]) -> None:
        self._frozen = processes
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)


class Zombie(Freeze):
    """A worker and its guardian stand still until others have all that it held; then it wakes and goes on writing."""

    def fire(self, stage: FaultTargets) -> bool:
        target = stage.victim(self.planned.choice)
        if target is None:
            return False
        held = stage.executions(target)
        self._freeze([*target.guardians, target.process])
        return self._fired(held, target.name)


class NoReaper(Freeze):
    """All reapers stand still, so that supervisors start no others; a worker is lost with its tree meanwhile."""

    def fire(self, stage: FaultTargets) -> bool:
        target = stage.victim(self.planned.choice)
        if target is None:
            return False
        self._freeze(stage.crew.reapers())
        held = stage.executions(target)
        with contextlib.suppress(psutil.Error):
            for process in [*target.process.children(recursive=True), target.process]:
                process.kill()
        return self._fired(held, target.name)


class Trap(Fault):
    """A request that harms the worker that runs it, once: it hangs, with or without the GIL, or crashes."""

    def __init__(self, planned: Planned, number: int) -> None:
        super().__init__(planned, number)
        self._mark: Path | None = None
        self._name = ""

    def fire(self, stage: FaultTargets) -> bool:
        if self._mark is None:
            self._mark = stage.folder / f"sprung-{self.number}"
            order = self._order(stage, self._mark)
            self._name = order.id
            if not submit(stage.client, stage.journal, order):
                self.number += 1000  # nobody knows what became of it; the judge will
                self._mark = None
            return False
        if not self._mark.exists():
            return False
        held = {}
        with contextlib.suppress(redis.RedisError):
            for target in stage.crew.targets(stage.store):
                if self._name in target.held:
                    held = stage.executions(target)
        return self._fired(held)

    def _order(self, stage: FaultTargets, mark: Path) -> Order:
        kind = {"hang": "hang", "hang_gil": "gil", "crash": "crash"}[self.planned.kind]
        trap = {"at": 3, "kind": kind, "seconds": self.planned.lasts, "mark": str(mark)}
        payload = {"seed": int(self.planned.choice * 10**9), "n": 12, "sleep": 0.005, "trap": trap}
        return Order(f"trap-{self.number}", WALK, payload, STEPS)


class Poison(Trap):
    """A request that does harm each time it runs, and so must end as failed; what runs beside it must not."""

    def _order(self, stage: FaultTargets, mark: Path) -> Order:
        seed, kind = int(self.planned.choice * 10**9), self.planned.kind.removeprefix("poison_")
        payload = {"seed": seed, "n": 12, "sleep": 0.005, "poison": {"kind": kind, "mark": str(mark)}}
        # A generator's exception is its own; in a batch it comes out of the step of all.
        return Order(f"poison-{self.number}", BLEND if kind == "raises" else WALK, payload, STEPS)


class Reuse(Fault):
    """RQ's ``Job.delete`` of a request that waits or runs, and another one under its id; the old run may yet write."""

    def __init__(self, planned: Planned, number: int) -> None:
        super().__init__(planned, number)
        self._old = 0.0

    def fire(self, stage: FaultTargets) -> bool:
        name, now = f"reuse-{self.number}", time.monotonic()
        if not self._old:
            if submit(stage.client, stage.journal, self._order(name, 0)):
                self._old = now
            else:
                self.number += 1000  # nobody knows what became of it; the judge will
            return False
        if now < self._old + self.planned.choice / 2:
            return False
        # From here on nobody knows whether the old one is there, until it is known that it is not.
        stage.journal.write(WITHDRAWN, name, durable=True)
        connection = stage.store.connection
        held: dict[str, str] = {}
        try:
            record = stage.store.fetch(name)
            if record is not None and record.execution:
                held[name] = record.execution
            with contextlib.suppress(NoSuchJobError):
                Job.fetch(name, connection=connection).delete()
        except (redis.RedisError, ValueError):  # RQ's delete raises the latter for an execution that ends under it
            self._old, self.number = 0.0, self.number + 1000
            return False
        if not submit(stage.client, stage.journal, self._order(name, 1)):
            self._old, self.number = 0.0, self.number + 1000
            return False
        return self._fired(held, "while it ran" if held else "while it waited, or after its end")

    def _order(self, name: str, life: int) -> Order:
        payload = {"seed": int(self.planned.choice * 10**9) + life, "n": 60, "sleep": 0.005}
        return Order(name, WALK, payload, STEPS)


class Visit(Fault):
    """A process comes, works for a while, and leaves; it has happened once the process has begun its work."""

    def __init__(self, planned: Planned, number: int) -> None:
        super().__init__(planned, number)
        self._guests: list[ChaosProcess] = []
        self._name = f"{planned.kind}-{number}"

    def fire(self, stage: FaultTargets) -> bool:
        self._guests = self._invite(stage)
        return self._fired(note=self._name)

    def heal(self, stage: FaultTargets) -> bool:
        if not self._begun(stage):
            if not any(guest.running for guest in self._guests):
                # Ended by another fault before it had begun; RQ may still know its name.
                self._name += "-again"
                self._guests = self._invite(stage)
            return False
        self.undo(stage)
        return super().heal(stage)

    def undo(self, stage: FaultTargets) -> None:
        for guest in self._guests:
            if guest.running:
                guest.process.terminate()

    def _invite(self, stage: FaultTargets) -> list[ChaosProcess]:
        crew, kind = stage.crew, self.planned.kind
        command = crew.worker(self._name)
        if kind == "second_reaper":
            return [crew.invite(self._name, [sys.executable, "-P", "-m", "perdure.recovery", "--name", self._name])]
        if kind == "other_model":
            return [crew.invite(self._name, command, {MODEL: OTHER})]
        if kind == "half_broken":
            return [crew.invite(self._name, command, {LACKS: "1"})]
        if kind == "same_name":
            return [crew.invite(f"{self._name}-{letter}", command) for letter in "ab"]
        wrapper = [shutil.which("faketime") or "faketime", "-f", "+1h" if kind == "clock_ahead" else "-1h"]
        # A step of the wall clock is what happens to hosts; the monotonic clock never steps.
        return [crew.invite(self._name, [*wrapper, *command], {"FAKETIME_DONT_FAKE_MONOTONIC": "1"})]

    def _begun(self, stage: FaultTargets) -> bool:
        """From what they print: another fault may have ended them since."""
        logs = [stage.folder / f"{guest.name}.log" for guest in self._guests]
        texts = [log.read_text(errors="replace") for log in logs if log.exists()]
        return any("Listening on" in text or "sweeping" in text for text in texts)


CLASSES: Final[dict[str, type[Fault]]] = {
    "kill_worker": KillWorker, "kill_guardian": KillGuardian, "kill_tree": KillTree, "kill_supervisor": KillMember,
    "kill_reaper": KillReaper, "kill_producer": KillMember, "zombie": Zombie, "hang": Trap, "hang_gil": Trap,
    "crash": Trap, "redis_kill": RedisKill, "redis_stop": RedisStop, "script_flush": ScriptFlush,
    "client_kill": ClientKill, "full": Full, "cut": Network, "hidden_reply": Network, "black_hole": Network,
    "slow": Network, "clock_ahead": Visit, "clock_behind": Visit, "same_name": Visit, "second_reaper": Visit,
    "no_reaper": NoReaper, "other_model": Visit, "half_broken": Visit, "busy": Busy, "clock_step": ClockStep,
    "no_replicas": NoReplicas, "reuse": Reuse, "poison_raises": Poison, "poison_exits": Poison,
}  # fmt: skip
