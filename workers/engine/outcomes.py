"""What a step has brought, and what follows from what it has raised; how requests leave the engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.records import FailureKind
from ...protocol.settings import Settings
from ...recovery.failures import classify, describe
from ..guardian.watchdog import Watchdog
from ..leases.holdings import Holdings
from ..pool.statuses import UNFIT
from ..tasks.base import RAISED, Raised, Step
from ..tasks.forks import foreign
from ..tasks.members import Members
from ..tasks.unfit import Unfit
from .admissions import Admissions
from .device_memory import forget
from .engines import Engine
from .fitness import Fitness
from .soundness import Blame


@dataclass(slots=True)
class Outcomes:
    """Hands over what the steps of an engine bring, for the engine loop, in its thread."""

    holdings: Holdings
    settings: Settings
    watchdog: Watchdog
    fitness: Fitness
    admissions: Admissions
    log: logging.Logger

    def offer(self, engine: Engine, steps: Sequence[Step]) -> list[str]:
        """Hand steps over; returns the ids of the requests that go on only when theirs are stored."""
        executions = dict(engine.admitted)
        errors = {step.request_id: step.error for step in steps if step.error is not None}
        kinds = {name: classify(error) for name, error in errors.items()}
        for name, kind in kinds.items():
            if kind is FailureKind.GPU_ERROR:
                # Before anything else is done with the steps: their states may lie on the device.
                self.fitness.judge(errors[name])
                return []
        full = {name: executions[name] for name in kinds if kinds[name] is FailureKind.GPU_OOM and name in executions}
        needed = [engine.needed.get(name) for name in full]
        unfit = [(name, executions[name]) for name in kinds if isinstance(errors[name], Unfit) and name in executions]
        doubtful = {
            step.request_id: executions[step.request_id]
            for step in steps
            if isinstance(step, Raised)
            and kinds[step.request_id] is FailureKind.ERROR
            and step.request_id in executions
        }
        for step in steps:
            if step.ends:
                engine.left(step.request_id)
        spared = {*full, *dict(unfit), *doubtful}
        if spared:
            steps = [_without_error(step) if step.request_id in spared else step for step in steps]
        broken = self.holdings.offer(steps, executions)
        while self.holdings.raised:
            self.fitness.judge(self.holdings.raised.pop())
        if self.fitness.device_error is not None:
            return []
        for identifier in broken:
            self.drop(engine, identifier)
        if unfit:
            self.holdings.put_back(unfit, f"its worker is unfit: {errors[unfit[0][0]]}")
        if full:
            self.admissions.ran_out(engine, list(full.items()), len(executions), errors[next(iter(full))], needed[0])
        elif steps:
            self.admissions.went_well(engine, len(executions))
            engine.soundness.stepped([step.request_id for step in steps if step.request_id not in errors])
        for name, execution in doubtful.items():
            self._blame(engine, [(name, execution)], errors[name])
        for error in errors.values():
            self.fitness.judge(error)
        return [step.request_id for step in steps if step.durable and not step.ends]

    def fail_step(self, engine: Engine, error: BaseException) -> None:
        """A step raised. Nobody can tell whose fault it was: all that took part are concerned."""
        concerned = list(engine.admitted.items())
        needed = engine.needed.get(concerned[0][0])
        kind = classify(error)
        if kind is FailureKind.HOST_OOM:
            forget(error)  # what follows needs memory as well
        self.log.error("a step of %s failed for %d request(s)", engine.path, len(concerned), exc_info=error)
        if kind is FailureKind.GPU_OOM:
            # Nobody knows either what the step has left half done: all are admitted anew, those that wait after them.
            self.drop_all(engine)
            self.admissions.ran_out(engine, concerned + engine.take_waiting(), len(concerned), error, needed)
            return
        if kind is FailureKind.ERROR or (kind is FailureKind.INVALID_REQUEST and len(concerned) > 1):
            self._blame(engine, concerned, error)
            return
        if kind is not FailureKind.GPU_ERROR:
            self.fail_all(engine, error)
        self.fitness.judge(error)

    def _blame(self, engine: Engine, concerned: Sequence[tuple[str, str]], error: BaseException) -> None:
        """An error that says nothing of whose it is: the request's that was alone, one of several, or the engine's."""
        for identifier, _ in concerned:
            self.drop(engine, identifier)
        if self.fitness.left:
            return  # by what a drop has raised
        blame = engine.soundness.raised([name for name, _ in concerned], lambda: self._probe(engine))
        why = f"a step raised {describe(error)}"
        leaves = blame in (Blame.ENGINE, Blame.EITHER)
        if blame in (Blame.ENGINE, Blame.UNKNOWN):
            reason = f"{why}; {'this worker is broken' if leaves else 'nothing has shown yet whose fault that is'}"
            self.holdings.put_back(concerned, reason, delay=0.0 if leaves else self.settings.retry_base)
        else:
            counted = {Blame.ALL: "batch", Blame.EITHER: "crash"}.get(blame, "")
            # At once: the last one of several that reach Redis one by one would count as having been alone.
            with self.holdings.lock:
                for identifier, execution in concerned:
                    self.holdings.fail(identifier, execution, error, counted=counted)
        if leaves:
            self.log.critical("this worker is unfit: %s, and no other request was stepped well since; leaving", why)
            self.fitness.leave(UNFIT)

    def _probe(self, engine: Engine) -> bool | None:
        self.watchdog.tick(engine.step_timeout(self.settings))
        try:
            with foreign:
                return engine.batch.probe()
        except RAISED as error:
            self.log.exception("%s raised while it probed itself", engine.path)
            self.fitness.judge(error)
            return False

    def fail_all(self, engine: Engine, error: BaseException) -> None:
        """All that are in the engine end with this error."""
        concerned = list(engine.admitted.items())
        self.drop_all(engine)
        # At once: the last one of several that reach Redis one by one would count as having been alone.
        with self.holdings.lock:
            for identifier, execution in concerned:
                self.holdings.fail(identifier, execution, error)

    def drop_all(self, engine: Engine) -> None:
        """As :meth:`drop`, of all that are in the engine."""
        for identifier in list(engine.admitted):
            self.drop(engine, identifier)

    def drop(self, engine: Engine, identifier: str) -> None:
        """The task lets go of a request, if it has it. A device that is lost is not called, not even for that."""
        if self.fitness.device_error is not None:
            return
        if engine.waiting.pop(identifier, None):
            engine.changed = True
        if identifier not in engine.admitted:
            return
        engine.left(identifier)
        seconds = engine.batch.stepping_for(identifier) if isinstance(engine.batch, Members) else 0.0
        try:
            with foreign:
                engine.batch.drop(identifier)
        except RAISED as error:
            self.log.exception("%s raised while it dropped %s", engine.path, identifier)
            self.fitness.judge(error)
        if isinstance(engine.batch, Members) and seconds > engine.step_timeout(self.settings):
            self._note_hang(engine, engine.batch, identifier, seconds)

    def _note_hang(self, engine: Engine, batch: Members, identifier: str, seconds: float) -> None:
        left = batch.free_slots
        self.log.error(
            "%s: a step of %s has run for %.1f s, longer than its step timeout. It cannot be ended from outside: its "
            "slot stays taken until it ends by itself (%d of %d left)%s",
            engine.path,
            identifier,
            seconds,
            left,
            batch.slots,
            "" if left else "; this worker claims nothing more",
        )


def _without_error(step: Step) -> Step:
    """What a step has put out before its error."""
    return Step(step.output, step.state, step.request_id)
