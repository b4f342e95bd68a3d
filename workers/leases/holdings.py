"""Everything this worker holds, behind one lock: where the engine loop and the courier meet.

The loop, in the main thread, adds what the engine put out and learns whether it may go on; it never waits
for Redis, but for a durable step. The courier, in its own thread, takes what is to be sent and writes down
what Redis answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...protocol.errors import PerdureError
from ...protocol.records import FailureKind
from ...protocol.settings import LEASE, Settings
from ...protocol.transitions.calls import Claim
from ...recovery.failures import POLICIES, classify
from ..tasks.base import NOTHING, RAISED, Step
from .capacity import Capacity
from .hearing import Early
from .holding import Handback, Holding
from .mailbox import Drop, Mailbox, OutputsStored, Stop

MAX_BUFFER = 32 * 1024 * 1024
"""Bytes of unsent outputs after which the engine loop pauses."""

PASSED_OVER = "its steps began to bring no state after one was passed over; from now on each is kept here"

NO_CHECKPOINT = "damaged"
"""The fingerprint of a checkpoint that cannot be read: no worker shows it, so the request restarts from zero."""


@dataclass(slots=True)
class Holdings:
    """The held requests and the state around them; every method takes the lock, attributes are read under it."""

    settings: Settings
    mailbox: Mailbox
    lock: threading.Condition = field(default_factory=threading.Condition)
    held: dict[str, Holding] = field(default_factory=dict)
    early: Early = field(default_factory=Early)
    handbacks: list[Handback] = field(default_factory=list)
    capacity: Capacity = field(init=False)
    task: str = ""
    """What is held now; the worker runs one task at a time."""
    parked: threading.Event = field(default_factory=threading.Event)
    """Set by the loop when it takes no further step."""
    urgent: bool = False
    """Something is to be sent before the next checkpoint is due."""
    hungry: bool = False
    """The courier waits for anything that it could store."""
    prompt: bool = False
    """A request has put something out for which somebody waits."""
    wanting: bool = True
    """A slot came free, or there may be more work: claim without waiting for a bell."""
    moved: float = field(default_factory=time.monotonic)
    """When the loop last showed life (monotonic seconds)."""
    stepping: bool = False
    """The loop is inside the task's code."""
    apart: frozenset[str] | None = None
    """The requests whose step runs now beside the loop; ``None`` for a task that the loop itself steps."""
    dropping: set[str] = field(default_factory=set)
    """Not held any more, but the loop has not dropped them yet."""
    storing: dict[str, str] = field(default_factory=dict)
    """Request id -> execution of those that go on only when all that they have put out is stored."""
    contact: float = field(default_factory=time.monotonic)
    """When Redis answered last."""
    loading_until: float = 0.0
    stopping_since: float | None = None
    cold: bool = False
    eager: set[str] = field(default_factory=set)
    """Tasks of which every state is captured, however large: they do not give one at every step."""
    raised: list[BaseException] = field(default_factory=list)
    """What copying a state has raised; the loop judges it."""

    def __post_init__(self) -> None:
        self.capacity = Capacity(self.settings, self.lock, self._want)

    # --- stopping ----------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """True once :meth:`stop` was called."""
        return self.stopping_since is not None

    def stop(self, *, cold: bool = False) -> None:
        """No more claims and no more steps. ``cold``: what is held is handed back without waiting for the step."""
        with self.lock:
            if self.stopping_since is None:
                # First the letter: whoever is woken by the flag must find it before it takes another step.
                self.mailbox.put(Stop())
                self.stopping_since = time.monotonic()
            self.cold = self.cold or cold
            self._hasten()

    # --- for the engine loop -----------------------------------------------------------------------

    def loading(self, seconds: float) -> None:
        """Leases are renewed for so many seconds without a step: a model is being loaded. 0 ends it."""
        with self.lock:
            self._part(None)
            self._sign_of_life()
            self.loading_until = self.moved + seconds if seconds else 0.0

    def dropped(self, identifiers: Iterable[str]) -> None:
        """The loop has let go of these, so that :meth:`Capacity.resize` counts their slots."""
        with self.lock:
            if not self.dropping.isdisjoint(identifiers):
                self.dropping.difference_update(identifiers)
                self._want()

    def set_apart(self, identifiers: frozenset[str] | None) -> None:
        """Which requests move by themselves from now on; see :attr:`apart`."""
        with self.lock:
            self._part(identifiers)

    def step_timeouts(self) -> list[float]:
        """Seconds that one step may take, of each held request: its own, else the task's, else the setting (lock held).

        Those of the task when nothing is held.
        """
        default = self.capacity.step_timeout(self.task)
        return [item.claim.step_timeout or default for item in self.held.values() if not item.claim.plain] or [default]

    def longest_step(self) -> float:
        """Seconds that a step of what is held now may take: a batch steps all together, by the longest."""
        with self.lock:
            return max(self.step_timeouts())

    def offer(self, steps: Sequence[Step], executions: Mapping[str, str]) -> list[str]:
        """Take the steps of one turn of the engine; returns ids of requests that must be dropped from it: those whose
        output, state or result cannot be stored, or that must go back to their last checkpoint.

        ``executions``: for which execution each was admitted; a step of an older one is not this one's.
        """
        broken = []
        unfit = False
        with self.lock:
            if steps or self.apart is None:
                self._sign_of_life()
            for step in steps:
                holding = self.current(step.request_id, executions.get(step.request_id, ""))
                if holding is None or holding.leaving:
                    continue
                holding.eager = holding.claim.task in self.eager
                try:
                    holding.add(step, self.settings)
                except RAISED as error:
                    if not isinstance(error, PerdureError):
                        self.raised.append(error)  # of the device that a state's tensor is on
                        unfit = POLICIES[classify(error)].worker == "exit"
                    holding.fail(error)
                    self.urgent = True
                    if not step.ends:
                        broken.append(step.request_id)
                    if unfit:
                        break  # the next copy would only call the same device
                if holding.stuck(step):
                    self.eager.add(holding.claim.task)
                    self.handbacks.append(Handback(holding, PASSED_OVER))
                    self.urgent = True
                    broken.append(step.request_id)
                self.urgent = self.urgent or step.ends
                self.prompt = self.prompt or holding.prompt
            if self.urgent or self.prompt or (self.hungry and any(map(_stores, steps))):
                self.lock.notify_all()
        return broken

    def fail(
        self,
        identifier: str,
        execution: str,
        error: BaseException,
        *,
        kind: FailureKind | None = None,
        counted: str = "",
    ) -> None:
        """End an execution with a failure, of the error's kind or another; ``counted``: see :meth:`Holding.fail`."""
        with self.lock:
            self._sign_of_life()
            holding = self.current(identifier, execution)
            if holding is not None and not holding.leaving:
                holding.fail(error, kind, counted)
                self._hasten()

    def put_back(self, executions: Iterable[tuple[str, str]], reason: str, *, delay: float = 0.0) -> None:
        """Release requests, by id and execution, to the front of their queues, where they keep this order.

        With a ``delay`` in seconds, they may be claimed again only after it, however often that happens.
        """
        with self.lock:
            self._sign_of_life()
            for identifier, execution in executions:
                holding = self.current(identifier, execution)
                if holding is not None and not holding.leaving:
                    self.handbacks.append(Handback(holding, reason, delay, longest=delay))
                    self._hasten()

    def hand_back(
        self, claim: Claim, *, reason: str, delay: float, fingerprint: str = "", unable: bool = False
    ) -> None:
        """Release a request that this worker cannot run; ``delay`` in seconds before another may. ``unable``: it could
        not load its task.
        """
        with self.lock:
            self._sign_of_life()
            if holding := self.current(claim.id, claim.execution):
                self.handbacks.append(Handback(holding, reason, delay, fingerprint, unable))
            self._hasten()

    def accept(self, claim: Claim, fingerprint: str) -> None:
        """The engine has taken a request in; its checkpoints will carry this fingerprint."""
        with self.lock:
            self._sign_of_life()
            if holding := self.current(claim.id, claim.execution):
                holding.fingerprint = fingerprint
                holding.accepted = time.monotonic()

    def ended_plain(self, identifier: str) -> None:
        """RQ's own code has ended a plain job."""
        with self.lock:
            self._sign_of_life()
            self.held.pop(identifier, None)
            self._want()

    def wait_stored(self, identifiers: Sequence[str], timeout: float) -> bool:
        """Wait until all that these requests have put out is in Redis, or they are lost or stopped.

        False after ``timeout`` seconds in which that has not come.
        """
        with self.lock:
            self._hasten()
            return self.lock.wait_for(
                lambda: self.stopping or not any(self.held[name].unsent for name in identifiers if name in self.held),
                timeout,
            )

    def watch_stored(self, executions: Mapping[str, str]) -> None:
        """Have a ``OutputsStored`` put into the mailbox for each of these once all that it has put out is in Redis."""
        with self.lock:
            self.storing.update(executions)
            self._hasten()

    def may_step(self) -> bool:
        """False while the engine must not step, after up to a second of waiting for the change.

        That is when the buffer is full, when by this process' own clock the leases must be over, and when the
        worker stops.
        """
        with self.lock:
            self.lock.wait_for(lambda: self.stopping or not self._overdue(), timeout=1.0)
            if self.stopping or self._overdue():
                return False
            self._sign_of_life()
            return True

    def _overdue(self) -> bool:
        # Only when all leases must be over: one that has a short step timeout does not keep the others waiting.
        if self.held and time.monotonic() - self.contact > LEASE * max(self.step_timeouts()):
            return True
        return sum(holding.size for holding in self.held.values()) > MAX_BUFFER

    def excuse(self) -> None:
        """The loop may stand still while the courier waits for Redis: outside of a step, that is life."""
        with self.lock:
            if not self.stepping:
                self._sign_of_life()

    def _sign_of_life(self) -> None:
        self.moved = time.monotonic()
        if self.apart is not None:
            for name, holding in self.held.items():
                if name not in self.apart:
                    holding.moved = self.moved

    def _part(self, apart: frozenset[str] | None) -> None:
        if self.apart is None and apart is not None:
            # What moved with the loop until now is from here on as old as that.
            for holding in self.held.values():
                holding.moved = max(holding.moved, self.moved)
        self.apart = apart

    def last_moved(self, holding: Holding) -> float:
        """When a holding last showed life (monotonic seconds, lock held): with the loop, unless it moves by itself."""
        return max(holding.moved, self.moved) if self.apart is None else holding.moved

    def _hasten(self) -> None:
        self.urgent = True
        self.lock.notify_all()

    def _want(self) -> None:
        self.wanting = True
        self._hasten()

    # --- for RQ's commands -------------------------------------------------------------------------

    def stop_request(self, identifier: str, execution: str = "") -> bool:
        """Have a request stopped that this worker holds, in the named execution or any; False if it does not."""
        with self.lock:
            holding = self.held.get(identifier)
            if holding is None or holding.claim.plain or execution not in ("", holding.claim.execution):
                return False
            holding.stopping = self.urgent = True
            self.lock.notify_all()
            return True

    def listen(self, identifier: str) -> None:
        """Somebody listens to a request that this worker may hold, or is about to."""
        with self.lock:
            if (holding := self.held.get(identifier)) is None:
                self.early.note(identifier)
                return
            holding.hearing.listen()
            self.prompt = self.prompt or holding.prompt
            self.lock.notify_all()

    # --- for the courier (lock held) ---------------------------------------------------------------

    def current(self, identifier: str, execution: str) -> Holding | None:
        """The holding of exactly this execution: a request that was lost may be held again."""
        holding = self.held.get(identifier)
        return holding if holding is not None and holding.claim.execution == execution else None

    @property
    def plain(self) -> bool:
        """True while a plain RQ job runs, always alone."""
        return any(holding.claim.plain for holding in self.held.values())

    def tell_stored(self) -> None:
        """Put a letter into the mailbox for each request of :meth:`watch_stored` whose outputs are in Redis now."""
        for name, execution in list(self.storing.items()):
            holding = self.current(name, execution)
            if holding is None or not holding.unsent:
                del self.storing[name]
                self.mailbox.put(OutputsStored(name, execution))

    def let_go(self, identifier: str) -> None:
        """The request is not this worker's any more."""
        self.held.pop(identifier, None)
        self.wanting = True
        self.dropping.add(identifier)
        self.mailbox.put(Drop(identifier))
        self.lock.notify_all()


def _stores(step: Step) -> bool:
    """Whether a step brings something that a checkpoint stores."""
    return step.output is not NOTHING or step.state is not NOTHING
