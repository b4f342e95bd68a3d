"""The engine loop: admits, steps, hands the steps over. It runs in the main thread and knows no Redis."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...protocol.codec import unpack
from ...protocol.errors import InvalidRequest, UsageError
from ...protocol.keys import check_task
from ...protocol.packed_state import unpack_state
from ...protocol.records import Claim, FailureKind
from ...protocol.settings import Settings
from ...protocol.tasks import resolve
from ...protocol.tensors import CannotRead
from ...recovery.failures import classify, describe
from ..guardian.watchdog import WAIT, Watchdog
from ..leases.holdings import NO_CHECKPOINT, Holdings
from ..leases.mailbox import Admission, Drop, Letter, News, Stop, Stored
from ..pool.statuses import HUNG, UNFIT
from ..tasks.base import RAISED, AnyTask, Raised, Request, Step
from ..tasks.forks import foreign
from ..tasks.members import Members
from ..tasks.unfit import Unfit
from .admissions import Admissions
from .device_memory import forget
from .engines import Engine, Waiting, as_batch
from .fitness import Fitness
from .soundness import Blame
from .unable import BROKEN, Unable

CANNOT_RUN_DELAY = 5.0
"""Seconds before a request may be claimed again that this worker could not run."""

CLOSING_TIMEOUT = 0.5
"""Seconds that a stopping worker waits for requests to be closed that move by themselves, before they are handed back."""


class PlainRunner(Protocol):
    """Runs a plain RQ job to its end."""

    def __call__(self, claim: Claim) -> None: ...


@dataclass(slots=True)
class EngineLoop:
    """Turns of: read the mailbox, step the engine once, offer what came of it.

    Requests that move by themselves (:class:`Members`) are not waited for: a turn collects the steps that have
    come, and lets those go on again. All waiting is for the mailbox.
    """

    holdings: Holdings
    settings: Settings
    run_plain: PlainRunner
    shown: Callable[[list[str]], None]
    """Called with all fingerprints when another task has been loaded."""

    watchdog: Watchdog = field(default_factory=Watchdog)
    hung: Callable[[str], None] = lambda why: None
    """Called when this process can run nothing any more and must be replaced."""
    broken: Callable[[str, BaseException], None] = lambda task, error: None
    """Called with a task that could not be loaded."""
    between: Callable[[], None] = lambda: None
    """Called in every turn, outside of the task's code: what a step may have changed of the process is made good."""
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    find: Callable[[str], AnyTask] = resolve
    unable: Unable = field(default_factory=Unable)
    fitness: Fitness = field(init=False)
    left_behind: bool = False
    """Threads of requests still run at the end, and must not be met by the end of the interpreter."""
    _admissions: Admissions = field(init=False)
    _engines: dict[str, Engine] = field(default_factory=dict)
    _engine: Engine | None = None
    _stopped: bool = False
    _resumed: bool = False
    """All members were let go on: there is nothing to do until one of them, or the courier, writes."""

    def __post_init__(self) -> None:
        self.fitness = Fitness(self.holdings.stop, self.log)
        self._admissions = Admissions(self.holdings, self.fitness, self.log, self._tick_for)

    @property
    def exit_code(self) -> int:
        """With what the process exits."""
        return self.fitness.status

    @exit_code.setter
    def exit_code(self, status: int) -> None:
        self.fitness.status = status

    def preload(self) -> None:
        """Load the tasks of ``PERDURE_TASKS``. Raises what loading raises: such a worker must not claim."""
        for path in self.settings.tasks:
            self._load(path)
        self.watchdog.rest()  # what comes before the first turn is no step

    def run(self) -> None:
        """Until the courier says stop; every request is then dropped from the engine, between two steps."""
        while not self._ends():
            self.turn()
        engine = self._engine
        if engine is not None and self.fitness.device_error is None:
            if isinstance(engine.batch, Members):
                self._drain(engine, engine.batch)
            else:
                self._drop_all(engine)
        if engine is not None and (lost := self.fitness.device_error) is not None:
            # Nobody can tell whose fault it was, and the task is not called again, not even to drop.
            self._fail_all(engine, lost)
        self.watchdog.rest()
        self.holdings.parked.set()

    def turn(self) -> None:
        """Read the mail, which is waited for if there is nothing else to do, and step once."""
        self._tick()
        self.between()
        self._read_mail()
        self._tick()
        engine = self._engine
        if self._ends() or engine is None:
            return
        if isinstance(engine.batch, Members):
            self._collect(engine, engine.batch)
            self._resumed = bool(engine.admitted) and self.holdings.may_step()
            if self._resumed:
                engine.batch.resume()
                self.holdings.set_apart(engine.batch.computing)
        elif engine.admitted and self.holdings.may_step():
            self._step(engine)

    def _tick(self) -> None:
        """The loop moves, and does nothing now but to wait for a while."""
        self.watchdog.tick(self.holdings.longest_step() + WAIT)

    def _tick_for(self, engine: Engine, claim: Claim) -> None:
        """The task's code for one request comes next, which may take as long as one of its steps."""
        self.watchdog.tick(claim.step_timeout or engine.step_timeout(self.settings))

    def _read_mail(self) -> None:
        engine = self._engine
        idle = engine is None or not (engine.admitted or engine.waiting)
        dropped = []
        allowed = self.holdings.longest_step() + WAIT
        for letter in self.holdings.mailbox.take(wait=idle or self._resumed):
            if isinstance(letter, Drop):
                dropped.append(letter.id)
            self.watchdog.tick(allowed)
            self._read(letter)
        if self._engine is not None and not self._ends():
            self._admissions.admit(self._engine)
        self._count_slots()
        self.holdings.dropped(dropped)

    def _read(self, letter: Letter) -> None:
        match letter:
            case Stop():
                self._stopped = True
            case Drop():
                self._drop(letter.id)
            case Stored():
                engine = self._engine
                if engine and isinstance(engine.batch, Members) and engine.admitted.get(letter.id) == letter.execution:
                    engine.batch.release([letter.id])
            case Admission():
                if not self._ends():
                    self._admit(letter)
            case News():
                pass  # it ended the waiting

    def _admit(self, admission: Admission) -> None:
        claim = admission.claim
        if claim.plain:
            self._run_plain(claim)
            return
        self._drop(claim.id)  # if it was lost and claimed again before its old execution had left the engine
        try:
            check_task(claim.task)
        except UsageError as error:
            self.holdings.fail(claim.id, claim.execution, error)  # no worker will ever have it
            return
        try:
            engine = self._engine_for(claim.task)
        except RAISED as error:
            self._cannot_load(claim, error)
            return
        if claim.seq and claim.fingerprint != engine.fingerprint:
            reason = f"another model began it (fingerprint {claim.fingerprint[:12]}, here {engine.fingerprint[:12]})"
            # One without any fingerprint is shown by nobody: nobody can be waited for.
            shown = claim.fingerprint or NO_CHECKPOINT
            self.holdings.hand_back(claim, reason=reason, delay=1.0, fingerprint=shown)
            return
        try:
            request = _unpacked(admission.request)
        except InvalidRequest as error:
            self.holdings.fail(claim.id, claim.execution, error)
            return
        except CannotRead as error:
            # Nothing is wrong with the checkpoint: another worker may have what is missing here.
            self.log.error("request %s cannot go on here: %s", claim.id, error)
            self.holdings.hand_back(claim, reason=str(error), delay=CANNOT_RUN_DELAY, fingerprint=claim.fingerprint)
            return
        except ValueError as error:
            reason = f"the checkpoint cannot be read: {error}"
            self.holdings.hand_back(claim, reason=reason, delay=0.0, fingerprint=NO_CHECKPOINT)
            return
        engine.waiting[claim.id] = Waiting(claim, request)
        engine.changed = True

    def _cannot_load(self, claim: Claim, error: BaseException) -> None:
        """Leave the task to others for a while. That nobody can is found by a sweep (:mod:`perdure.recovery.unserved`)."""
        self.broken(claim.task, error)  # first: who hears of it may mend it at once
        found = self.unable.failed(claim.task, error)
        self.log.error(
            "cannot load %s (%s); its requests are handed back, and left to others for %.0f s", claim.task, found.reason,
            found.until - time.monotonic(), exc_info=error if found.kind == BROKEN else None,
        )  # fmt: skip
        reason = f"a worker could not load {claim.task}: {found.reason}"
        self.holdings.hand_back(claim, reason=reason, delay=0.0, unable=True)
        self.fitness.judge(error)

    def _run_plain(self, claim: Claim) -> None:
        self.watchdog.rest()  # it runs by RQ's rules, under RQ's timeout
        try:
            self.run_plain(claim)
        except InvalidRequest as error:
            self.holdings.fail(claim.id, claim.execution, error)
        else:
            self.holdings.ended_plain(claim.id)

    def _engine_for(self, path: str) -> Engine:
        engine = self._engines.get(path) or self._load(path)
        if engine is not self._engine:
            self._engine = engine
            engine.changed = True
            self.holdings.set_apart(engine.batch.computing if isinstance(engine.batch, Members) else None)
        return engine

    def _load(self, path: str) -> Engine:
        began = time.monotonic()
        self.holdings.loading(self.settings.load_timeout)
        self.watchdog.tick(self.settings.load_timeout)
        if path in self.unable.found:
            importlib.invalidate_caches()  # a module may have been put there since
        try:
            with foreign:
                batch = as_batch(self.find(path), lambda: self.holdings.mailbox.put(News()))
                batch.load()
                engine = Engine(path, batch, batch.fingerprint())
        finally:
            self._tick()
            self.holdings.loading(0)
        self._engines[path] = engine
        self.unable.loaded(path)
        self.log.info("loaded %s in %.1f s, %d slot(s)", path, time.monotonic() - began, batch.slots)
        self.shown([item.fingerprint for item in self._engines.values() if item.fingerprint])
        if self._engine is None:
            self._admissions.tell_room(engine)  # before the first claim
        self.holdings.loaded(path, batch.slots, batch.step_timeout)
        return engine

    def _step(self, engine: Engine) -> None:
        failed: BaseException | None = None
        self.holdings.stepping = True
        self.watchdog.tick(self.holdings.longest_step())
        try:
            with foreign:
                steps = [_checked(step) for step in engine.batch.step()]
        except Unfit as error:
            self.fitness.judge(error)
            return
        except RAISED as error:
            failed = error
        finally:
            self.holdings.stepping = False
        # Outside of the handler: in it, the interpreter refers to all that the failed step has made.
        if failed is not None:
            self._fail_step(engine, failed)
            return
        durable = self._offer(engine, steps)
        self._tick()
        while durable and not self.holdings.wait_stored(durable, WAIT):
            self._tick()

    def _offer(self, engine: Engine, steps: Sequence[Step]) -> list[str]:
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
            self._drop(identifier)
        if unfit:
            self.holdings.put_back(unfit, f"its worker is unfit: {errors[unfit[0][0]]}")
        if full:
            self._admissions.ran_out(engine, list(full.items()), len(executions), errors[next(iter(full))], needed[0])
        elif steps:
            self._admissions.went_well(engine, len(executions))
            engine.soundness.stepped([step.request_id for step in steps if step.request_id not in errors])
        for name, execution in doubtful.items():
            self._blame(engine, [(name, execution)], errors[name])
        for error in errors.values():
            self.fitness.judge(error)
        return [step.request_id for step in steps if step.durable and not step.ends]

    def _collect(self, engine: Engine, batch: Members) -> None:
        """Hand over what has come of the requests that move by themselves."""
        if stuck := batch.stuck(engine.step_timeout(self.settings)):
            self._replace(engine, stuck)
        steps = batch.collect()
        self.holdings.set_apart(batch.computing)
        durable = self._offer(engine, steps)
        if durable:
            # They alone wait for Redis.
            batch.withhold(durable)
            self.holdings.watch_stored({name: engine.admitted[name] for name in durable if name in engine.admitted})
        self._count_slots()

    def _drain(self, engine: Engine, batch: Members) -> None:
        """Let the running steps end, and what they bring be stored.

        The courier leaves after the drain timeout and hands back what is held; a worker that still sits here then
        is ended without waiting for the steps.
        """
        while True:
            self._collect(engine, batch)
            if self.fitness.device_error is not None:
                return
            if not batch.computing:
                break
            self._tick()
            self.between()
            for letter in self.holdings.mailbox.take(wait=True):
                if isinstance(letter, Drop):
                    self._drop(letter.id)
        self._drop_all(engine)
        self.left_behind = not batch.join(CLOSING_TIMEOUT)

    def _count_slots(self) -> None:
        for engine in self._engines.values():
            if isinstance(engine.batch, Members):
                self.holdings.resize(engine.path, engine.batch.free_slots)

    def _fail_step(self, engine: Engine, error: BaseException) -> None:
        """A step raised. Nobody can tell whose fault it was: all that took part are concerned."""
        concerned = list(engine.admitted.items())
        needed = engine.needed.get(concerned[0][0])
        kind = classify(error)
        if kind is FailureKind.HOST_OOM:
            forget(error)  # what follows needs memory as well
        self.log.error("a step of %s failed for %d request(s)", engine.path, len(concerned), exc_info=error)
        if kind is FailureKind.GPU_OOM:
            # Nobody knows either what the step has left half done: all are admitted anew, those that wait after them.
            self._drop_all(engine)
            self._admissions.ran_out(engine, concerned + engine.take_waiting(), len(concerned), error, needed)
            return
        if kind is FailureKind.ERROR or (kind is FailureKind.INVALID_REQUEST and len(concerned) > 1):
            self._blame(engine, concerned, error)
            return
        if kind is not FailureKind.GPU_ERROR:
            self._fail_all(engine, error)
        self.fitness.judge(error)

    def _blame(self, engine: Engine, concerned: Sequence[tuple[str, str]], error: BaseException) -> None:
        """An error that says nothing of whose it is: the request's that was alone, one of several, or the engine's."""
        for identifier, _ in concerned:
            self._drop(identifier)
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

    def _fail_all(self, engine: Engine, error: BaseException) -> None:
        concerned = list(engine.admitted.items())
        self._drop_all(engine)
        # At once: the last one of several that reach Redis one by one would count as having been alone.
        with self.holdings.lock:
            for identifier, execution in concerned:
                self.holdings.fail(identifier, execution, error)

    def _ends(self) -> bool:
        return self._stopped or self.fitness.left

    def _drop_all(self, engine: Engine) -> None:
        for identifier in list(engine.admitted):
            self._drop(identifier)

    def _drop(self, identifier: str) -> None:
        engine = self._engine
        if engine is None or self.fitness.device_error is not None:
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
            engine.path, identifier, seconds, left, batch.slots,
            "" if left else "; this worker claims nothing more",
        )  # fmt: skip

    def _replace(self, engine: Engine, why: str) -> None:
        """No step of this task can run here any more: the guardian ends the process, with the stacks as evidence.

        Without a guardian it leaves by itself.
        """
        if not self.exit_code:
            self.log.critical("%s: %s; this worker is to be replaced", engine.path, why)
            self.hung(why)
            self.fitness.leave(HUNG)


def _unpacked(request: Request) -> Request:
    """The request with its payload and its state as values.

    Raises :class:`InvalidRequest` for a payload that is none, and as :func:`unpack_state` for the state: a library
    of tensors is imported here, where a long import keeps no other request waiting for Redis.
    """
    try:
        payload = unpack(request.payload)
    except ValueError as error:
        raise InvalidRequest(f"the payload is {error}", "payload") from error
    return Request(
        id=request.id,
        payload=payload,
        attempt=request.attempt,
        execution=request.execution,
        outputs=request.outputs,
        state=None if request.state is None else unpack_state(request.state),
        queue=request.queue,
    )


def _checked(step: object) -> Step:
    if not isinstance(step, Step):
        raise TypeError(f"step() gives Steps, but this one gave a {type(step).__name__}")
    return step


def _without_error(step: Step) -> Step:
    """What a step has put out before its error."""
    return Step(step.output, step.state, step.request_id)
