"""The engine loop: admits, steps, hands the steps over. It runs in the main thread and knows no Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from ...protocol.codec import unpack
from ...protocol.errors import InvalidRequest, UsageError
from ...protocol.keys import check_task
from ...protocol.packed_state import unpack_state
from ...protocol.settings import Settings
from ...protocol.tasks import resolve
from ...protocol.tensors import CannotRead
from ...protocol.transitions.calls import Claim
from ..guardian.watchdog import WAIT, Watchdog
from ..leases.holdings import NO_CHECKPOINT, Holdings
from ..leases.mailbox import Admission, Drop, Letter, News, OutputsStored, Stop
from ..pool.statuses import HUNG
from ..tasks.base import RAISED, AnyTask, Request, Step
from ..tasks.forks import foreign
from ..tasks.members import Members
from ..tasks.unfit import Unfit
from .admissions import Admissions
from .engines import Engine, WaitingRequest
from .fitness import Fitness
from .loading import Engines
from .outcomes import Outcomes
from .unable import Unable

CANNOT_RUN_DELAY = 5.0
"""Seconds before a request may be claimed again that this worker could not run."""

CLOSING_TIMEOUT = 0.5
"""Seconds that a stopping worker waits for requests to be closed that move by themselves, before they are handed back.
"""


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
    _outcomes: Outcomes = field(init=False)
    _engines: Engines = field(init=False)
    _stopped: bool = False
    _resumed: bool = False
    """All members were let go on: there is nothing to do until one of them, or the courier, writes."""

    def __post_init__(self) -> None:
        self.fitness = Fitness(self.holdings.stop, self.log)
        self._admissions = Admissions(self.holdings, self.fitness, self.log, self._tick_for)
        self._outcomes = Outcomes(self.holdings, self.settings, self.watchdog, self.fitness, self._admissions, self.log)
        self._engines = Engines(
            self.holdings,
            self.settings,
            self.watchdog,
            self._admissions,
            self.log,
            shown=self.shown,
            broken=self.broken,
            find=self.find,
            unable=self.unable,
        )

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
            self._engines.load(path)
        self.watchdog.rest()  # what comes before the first turn is no step

    def run(self) -> None:
        """Until the courier says stop; every request is then dropped from the engine, between two steps."""
        while not self._ends():
            self.turn()
        engine = self._engines.current
        if engine is not None and self.fitness.device_error is None:
            if isinstance(engine.batch, Members):
                self._drain(engine, engine.batch)
            else:
                self._outcomes.drop_all(engine)
        if engine is not None and (lost := self.fitness.device_error) is not None:
            # Nobody can tell whose fault it was, and the task is not called again, not even to drop.
            self._outcomes.fail_all(engine, lost)
        self.watchdog.rest()
        self.holdings.parked.set()

    def turn(self) -> None:
        """Read the mail, which is waited for if there is nothing else to do, and step once."""
        self._tick()
        self.between()
        self._read_mail()
        self._tick()
        engine = self._engines.current
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
        engine = self._engines.current
        idle = engine is None or not (engine.admitted or engine.waiting)
        dropped = []
        allowed = self.holdings.longest_step() + WAIT
        for letter in self.holdings.mailbox.take(wait=idle or self._resumed):
            if isinstance(letter, Drop):
                dropped.append(letter.id)
            self.watchdog.tick(allowed)
            self._read(letter)
        if self._engines.current is not None and not self._ends():
            self._admissions.admit(self._engines.current)
        self._engines.count_slots()
        self.holdings.dropped(dropped)

    def _read(self, letter: Letter) -> None:
        match letter:
            case Stop():
                self._stopped = True
            case Drop():
                self._drop(letter.id)
            case OutputsStored():
                engine = self._engines.current
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
            engine = self._engines.switch(claim.task)
        except RAISED as error:
            self._engines.cannot_load(claim, error)
            self.fitness.judge(error)
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
        engine.waiting[claim.id] = WaitingRequest(claim, request)
        engine.changed = True

    def _run_plain(self, claim: Claim) -> None:
        self.watchdog.rest()  # it runs by RQ's rules, under RQ's timeout
        try:
            self.run_plain(claim)
        except InvalidRequest as error:
            self.holdings.fail(claim.id, claim.execution, error)
        else:
            self.holdings.ended_plain(claim.id)

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
            self._outcomes.fail_step(engine, failed)
            return
        durable = self._outcomes.offer(engine, steps)
        self._tick()
        while durable and not self.holdings.wait_stored(durable, WAIT):
            self._tick()

    def _collect(self, engine: Engine, batch: Members) -> None:
        """Hand over what has come of the requests that move by themselves."""
        if stuck := batch.stuck(engine.step_timeout(self.settings)):
            self._replace(engine, stuck)
        steps = batch.collect()
        self.holdings.set_apart(batch.computing)
        durable = self._outcomes.offer(engine, steps)
        if durable:
            # They alone wait for Redis.
            batch.withhold(durable)
            self.holdings.watch_stored({name: engine.admitted[name] for name in durable if name in engine.admitted})
        self._engines.count_slots()

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
        self._outcomes.drop_all(engine)
        self.left_behind = not batch.join(CLOSING_TIMEOUT)

    def _ends(self) -> bool:
        return self._stopped or self.fitness.left

    def _drop(self, identifier: str) -> None:
        if (engine := self._engines.current) is not None:
            self._outcomes.drop(engine, identifier)

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
    return replace(request, payload=payload, state=None if request.state is None else unpack_state(request.state))


def _checked(step: object) -> Step:
    if not isinstance(step, Step):
        raise TypeError(f"step() gives Steps, but this one gave a {type(step).__name__}")
    return step
