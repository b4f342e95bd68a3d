"""The engine loop: admits, steps, hands the steps over. It runs in the main thread and knows no Redis."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..protocol.codec import unpack
from ..protocol.errors import InvalidRequest, PerdureError, UnknownTask
from ..protocol.packed_state import unpack_state
from ..protocol.records import Claim
from ..protocol.settings import Settings
from ..protocol.tensors import CannotRead
from ..recovery.failures import POLICIES, classify
from .claimer import NO_CHECKPOINT
from .generators import as_batch
from .holdings import Holdings
from .mailbox import Admission, Drop, Letter, News, Stop, Stored
from .members import Members
from .tasks import RAISED, AnyTask, BatchTask, Request, Step, resolve
from .unfit import Unfit

CANNOT_RUN_DELAY = 5.0
"""Seconds before a request may be claimed again that this worker could not run."""

CLOSING_TIMEOUT = 0.5
"""Seconds that a stopping worker waits for requests to be closed that move by themselves, before they are handed back."""


class PlainRunner(Protocol):
    """Runs a plain RQ job to its end."""

    def __call__(self, claim: Claim) -> None: ...


@dataclass(slots=True)
class Engine:
    """A loaded task and what is admitted to it."""

    path: str
    batch: BatchTask
    fingerprint: str
    admitted: dict[str, str] = field(default_factory=dict)
    """Request id -> the execution for which it was admitted: it may come again while an old step still runs."""

    def step_timeout(self, settings: Settings) -> float:
        """Seconds that one step of its requests may take."""
        return self.batch.step_timeout or settings.step_timeout


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

    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    find: Callable[[str], AnyTask] = resolve
    exit_code: int = 0
    left_behind: bool = False
    """Threads of requests still run at the end, and must not be met by the end of the interpreter."""
    _engines: dict[str, Engine] = field(default_factory=dict)
    _engine: Engine | None = None
    _stopped: bool = False
    _resumed: bool = False
    """All members were let go on: there is nothing to do until one of them, or the courier, writes."""

    def preload(self) -> None:
        """Load the tasks of ``PERDURE_TASKS``. Raises what loading raises: such a worker must not claim."""
        for path in self.settings.tasks:
            self._load(path)

    def run(self) -> None:
        """Until the courier says stop; every request is then dropped from the engine, between two steps."""
        while not self._stopped:
            self.turn()
        engine = self._engine
        if engine is not None and isinstance(engine.batch, Members):
            self._drain(engine, engine.batch)
        elif engine is not None:
            self._drop_all(engine)
        self.holdings.parked.set()

    def turn(self) -> None:
        """Read the mail, which is waited for if there is nothing else to do, and step once."""
        self._read_mail()
        engine = self._engine
        if self._stopped or engine is None:
            return
        if isinstance(engine.batch, Members):
            self._collect(engine, engine.batch)
            self._resumed = bool(engine.admitted) and self.holdings.may_step()
            if self._resumed:
                engine.batch.resume()
                self.holdings.set_apart(engine.batch.computing)
        elif engine.admitted and self.holdings.may_step():
            self._step(engine)

    def _read_mail(self) -> None:
        idle = self._engine is None or not self._engine.admitted
        dropped = []
        for letter in self.holdings.mailbox.take(wait=idle or self._resumed):
            if isinstance(letter, Drop):
                dropped.append(letter.id)
            self._read(letter)
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
                if not self._stopped:
                    self._admit(letter)
            case News():
                pass  # it ended the waiting

    def _admit(self, admission: Admission) -> None:
        claim = admission.claim
        if claim.plain:
            self._run_plain(claim)
            return
        if self._engine is not None and claim.id in self._engine.admitted:
            self._drop(claim.id)  # lost and claimed again before its old execution had left the engine
        try:
            engine = self._engine_for(claim.task)
        except UnknownTask as error:
            self.holdings.fail(claim.id, claim.execution, _unknown(error))
            return
        except RAISED as error:
            self.log.exception("cannot load %s; its requests are handed back", claim.task)
            reason = f"a worker could not load {claim.task}: {type(error).__name__}: {error}"
            self.holdings.hand_back(claim, reason=reason, delay=CANNOT_RUN_DELAY)
            self._judge(error)
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
        try:
            engine.batch.admit(request)
        except RAISED as error:
            self.holdings.fail(claim.id, claim.execution, error)
            self._judge(error)
            return
        engine.admitted[claim.id] = claim.execution
        self.holdings.accept(claim, engine.fingerprint)

    def _run_plain(self, claim: Claim) -> None:
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
            self.holdings.set_apart(engine.batch.computing if isinstance(engine.batch, Members) else None)
        return engine

    def _load(self, path: str) -> Engine:
        began = time.monotonic()
        self.holdings.loading(self.settings.load_timeout)
        try:
            batch = as_batch(self.find(path), lambda: self.holdings.mailbox.put(News()))
            batch.load()
            engine = Engine(path, batch, batch.fingerprint())
        finally:
            self.holdings.loading(0)
        self._engines[path] = engine
        self.log.info("loaded %s in %.1f s, %d slot(s)", path, time.monotonic() - began, batch.slots)
        self.shown([item.fingerprint for item in self._engines.values() if item.fingerprint])
        self.holdings.loaded(path, batch.slots, batch.step_timeout)
        return engine

    def _step(self, engine: Engine) -> None:
        self.holdings.stepping = True
        try:
            steps = [_checked(step) for step in engine.batch.step()]
        except Unfit as error:
            self._leave(error)
            return
        except RAISED as error:
            # Nobody can tell whose fault it was: all that took part fail, by the policy for the error.
            self._fail_all(engine, error)
            return
        finally:
            self.holdings.stepping = False
        durable = self._offer(engine, steps)
        if durable:
            self.holdings.wait_stored(durable)

    def _offer(self, engine: Engine, steps: Sequence[Step]) -> list[str]:
        """Hand steps over; returns the ids of the requests that go on only when theirs are stored."""
        executions = dict(engine.admitted)
        for step in steps:
            if step.ends:
                engine.admitted.pop(step.request_id, None)
        for identifier in self.holdings.offer(steps, executions):
            self._drop(identifier)
        for step in steps:
            if step.error is not None:
                self._judge(step.error)
        while self.holdings.raised:
            self._judge(self.holdings.raised.pop())
        return [step.request_id for step in steps if step.durable and not step.ends]

    def _collect(self, engine: Engine, batch: Members) -> None:
        """Hand over what has come of the requests that move by themselves."""
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
            if not batch.computing:
                break
            for letter in self.holdings.mailbox.take(wait=True):
                if isinstance(letter, Drop):
                    self._drop(letter.id)
        self._drop_all(engine)
        self.left_behind = not batch.join(CLOSING_TIMEOUT)

    def _count_slots(self) -> None:
        for engine in self._engines.values():
            if isinstance(engine.batch, Members):
                self.holdings.resize(engine.path, engine.batch.free_slots)

    def _fail_all(self, engine: Engine, error: BaseException) -> None:
        self.log.error("a step of %s failed for %d request(s)", engine.path, len(engine.admitted), exc_info=error)
        for identifier, execution in list(engine.admitted.items()):
            self._drop(identifier)
            self.holdings.fail(identifier, execution, error)
        self._judge(error)

    def _judge(self, error: BaseException) -> None:
        """Leave after an error that makes this process unfit, whichever request it came from."""
        if POLICIES[classify(error)].worker == "exit":
            self.log.critical("this worker is unfit after %s; leaving, to be replaced", type(error).__name__)
            self.exit_code = 1
            self.holdings.stop()

    def _leave(self, error: Unfit) -> None:
        """No request is to blame: what is held is handed back, and the process exits with its status."""
        self.log.critical("this worker is unfit, and hands back what it holds: %s", error)
        self.exit_code = error.status
        self.holdings.stop()

    def _drop_all(self, engine: Engine) -> None:
        for identifier in list(engine.admitted):
            self._drop(identifier)

    def _drop(self, identifier: str) -> None:
        engine = self._engine
        if engine is None or identifier not in engine.admitted:
            return
        del engine.admitted[identifier]
        seconds = engine.batch.stepping_for(identifier) if isinstance(engine.batch, Members) else 0.0
        try:
            engine.batch.drop(identifier)
        except RAISED:
            self.log.exception("%s raised while it dropped %s", engine.path, identifier)
        if isinstance(engine.batch, Members) and seconds > engine.step_timeout(self.settings):
            self._note_hang(engine, engine.batch, identifier, seconds)

    def _note_hang(self, engine: Engine, batch: Members, identifier: str, seconds: float) -> None:
        left = batch.free_slots
        self.log.error(
            "%s: a step of %s has run for %.1f s, longer than its step timeout. It cannot be ended from outside: its "
            "slot stays taken until it ends by itself (%d of %d left)%s",
            engine.path, identifier, seconds, left, batch.slots,
            "" if left else "; this worker claims nothing more: start another in its place",
        )  # fmt: skip


class CannotImport(PerdureError):
    """The task's module cannot be imported here. Charged and tried again, unlike a task that is not there."""


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


def _unknown(error: UnknownTask) -> Exception:
    """How an unknown task ends a request: at once if the module is there and lacks it, else after retries.

    A module that cannot be imported may be one that this worker has not been given yet (a rolling
    upgrade): the request is tried a few times, elsewhere too, before it is a dead letter.
    """
    if isinstance(error.__cause__, ImportError):
        return CannotImport(str(error))
    return InvalidRequest(str(error), "task")
