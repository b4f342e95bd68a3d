"""The claimer: the part of the courier that asks for work.

An idle worker waits for its queues' bells. A stock producer rings none: so one of the idle workers asks each second in
any case, and the others every ten. A busy one with free slots asks at every checkpoint, so that a request joins a
running batch within one checkpoint interval.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ...protocol.keys import crowd, key
from ...protocol.reading.output_log import Outputs
from ...protocol.store import Store
from ...protocol.telemetry.logs import about
from ...protocol.transitions.calls import Claim
from ..leases.holding import Handback, Holding
from ..leases.holdings import NO_CHECKPOINT, Holdings
from ..leases.mailbox import Admission
from ..tasks.base import Request
from .bells import Bells
from .ledger import Measurements

LOOK: Final = 1.0
"""Seconds until the one of the idle workers that looks asks again."""

REST: Final = 10.0
"""Seconds until the others do."""

SOON: Final = 0.05

FIRST_BEAT: Final = 5.0
"""Seconds in which a guardian that was just started may send its first heartbeat. On a machine that starts a pool it
may come later than a short heartbeat timeout; the worker, declared dead, would start another guardian, and so on for
ever.
"""


@dataclass(slots=True)
class Limits:
    """What ends a worker by itself: RQ's ``--burst``, ``--max-jobs``, ``--max-idle-time`` (seconds)."""

    burst: bool = False
    max_jobs: int | None = None
    max_idle_time: float | None = None


@dataclass(slots=True)
class Claimer:
    """Fills free slots. Runs in the courier's thread, over the courier's store."""

    store: Store
    holdings: Holdings
    worker: str
    queues: Callable[[], list[str]]
    limits: Limits
    resume: bool
    log: logging.Logger
    unable: Callable[[], list[str]] = list
    """Tasks that this worker could not load, and leaves to others for now."""
    claimed: int = 0
    taken_from: str = ""
    """The queue of the last claim, for whoever turns the order of the queues after it."""
    settled: Callable[[], bool] = lambda: True
    """Whether nothing is left to tell of what has ended: a burst does not leave before."""
    between: Callable[[], None] = lambda: None
    """Called now and then while a long log or state is read: it does for all others what is due."""
    ledger: Measurements | None = None
    bells: Bells = field(init=False)
    looks: bool = True
    """Whether it is busy, or the one of the idle workers that asks each second; also before its first question."""
    _idle_since: float = field(default_factory=time.monotonic)
    _degraded: bool = False

    def __post_init__(self) -> None:
        self.bells = Bells(self.store.connection.connection_pool)

    def claim(self, incarnation: str) -> bool:
        """Ask once, if there is room; False when this incarnation was declared dead."""
        wanted = self._room()
        if wanted is None:
            return True
        task, free, slots, known = wanted
        queues = self.queues()
        if not known and not self.holdings.wanting and not self.limits.burst:
            names = [key("bell", queue) for queue in queues]
            if not self.looks:
                names.append(key("turn", crowd(tuple(queues))))
            if not self.bells.wait(names, self._patience()) or self.holdings.stopping:
                return True
        answer = self.store.claim(
            incarnation=incarnation,
            worker=self.worker,
            queues=queues,
            task=task,
            free=free,
            slots=slots,
            known=known,
            resume=self.resume,
            first_beat=FIRST_BEAT,
            unable=self.unable(),
        )
        if answer.status == "reaped":
            return False
        self._notice(degraded=answer.degraded)
        self.holdings.wanting = answer.status == "more"
        self.looks = answer.looks or bool(answer.claims or known)
        if answer.claims:
            self.taken_from = answer.claims[-1].queue
        if self.ledger is not None:
            self.ledger.claimed(answer.claims)
        self._receive(answer.claims)
        if not answer.claims and not known:
            self._nothing_found(answer.status)
        return True

    def _patience(self) -> float:
        """Seconds until an idle worker asks in any case."""
        seconds = LOOK if self.looks else REST
        if self.limits.max_idle_time is not None:
            seconds = min(seconds, self._idle_since + self.limits.max_idle_time - time.monotonic())
        return max(seconds, SOON)

    def _room(self) -> tuple[str, int, dict[str, int], list[str]] | None:
        """Task, free slots, slots per loaded task, and what is held; ``None`` for not now."""
        holdings, capacity = self.holdings, self.holdings.capacity
        with holdings.lock:
            if holdings.stopping:
                return None
            busy = bool(holdings.held)
            if busy:
                self._idle_since = time.monotonic()
            else:
                holdings.task = ""
            left = None if self.limits.max_jobs is None else self.limits.max_jobs - self.claimed
            if left is not None and left <= 0:
                if not busy:
                    self.log.info("Worker %s: finished executing %d jobs, quitting", self.worker, self.claimed)
                    holdings.stop()
                return None
            free = capacity.limited(capacity.slots.get(holdings.task, 1)) - len(holdings.held) if busy else 1
            if free <= 0 or holdings.plain or self._stands_still() or self._slots_unknown():
                return None
            slots = {path: capacity.limited(number) for path, number in capacity.slots.items()}
            if left is not None:
                free = min(free, left)
                slots = {path: min(number, left) for path, number in slots.items()}
            return holdings.task, free, slots, list(holdings.held)

    def _stands_still(self) -> bool:
        """Whether the loop shows no life (lock held): what a hung worker claims would wait for a whole lease.

        Also when nothing is held: all that was, may have been given to others while the step goes on.
        """
        holdings, now = self.holdings, time.monotonic()
        if 0 in holdings.capacity.slots.values():
            return True  # every thread of a task hangs
        if holdings.apart is not None or (not holdings.held and not holdings.stepping):
            return False  # idle is not hung, and what moves by itself keeps nobody waiting
        return now > holdings.loading_until and now - holdings.moved > min(holdings.step_timeouts()) / 2

    def _slots_unknown(self) -> bool:
        """Whether requests that are not held any more may still occupy slots (lock held): the loop will tell."""
        return self.holdings.apart is not None and bool(self.holdings.dropping)

    def _receive(self, claims: list[Claim]) -> None:
        if not claims:
            return
        holdings = self.holdings
        with holdings.lock:
            if not holdings.held and not holdings.stepping:
                holdings.moved = time.monotonic()  # idle was not hung
            for claim in claims:
                # Held before its checkpoint is read: that may take longer than a lease.
                holdings.held[claim.id] = holding = Holding.of(claim)
                if holdings.early.take(claim.id):
                    holding.hearing.listen()
                holdings.task = claim.task
                self.claimed += 1
        # Those that begin come first, then what has least to be read.
        waiting = sorted(claims, key=lambda claim: claim.offset if claim.seq or claim.offset else -1)
        try:
            while waiting:
                # Those that begin are handed over together; what goes on from a checkpoint has to be read before.
                number = next((i for i, claim in enumerate(waiting) if claim.seq or claim.offset), len(waiting)) or 1
                self._deliver(waiting[:number])
                del waiting[:number]
        finally:
            # No contact to Redis: what could not be read is forgotten, and the next claim gives it again.
            with holdings.lock:
                for claim in waiting:
                    if holdings.current(claim.id, claim.execution):
                        del holdings.held[claim.id]
                        self.claimed -= 1

    def _deliver(self, claims: Sequence[Claim]) -> None:
        """Read what the requests go on from, and hand them to the loop."""
        admissions = [self._admission(claim) for claim in claims]
        holdings = self.holdings
        letters = []
        with holdings.lock:
            for claim, admission in zip(claims, admissions, strict=True):
                holding = holdings.current(claim.id, claim.execution)
                if holding is None or holding.canceling:
                    continue  # lost or canceled meanwhile
                if isinstance(admission, str):
                    holdings.handbacks.append(Handback(holding, admission, fingerprint=NO_CHECKPOINT))
                    holdings.urgent = True
                else:
                    letters.append(admission)
            holdings.mailbox.put_all(letters)

    def _admission(self, claim: Claim) -> Admission | str:
        """The request as the task will see it, with what its checkpoint holds; a text if that is damaged."""
        outputs: list[Any] = []
        state: bytes | None = None
        try:
            if claim.offset:
                outputs = self._outputs(claim)
                if len(outputs) != claim.offset:
                    return f"the checkpoint names {claim.offset} outputs, but {len(outputs)} are stored"
            if claim.seq:
                state, sound = self.store.packed_state(claim.id, between=self.between)
                if not sound:
                    return "the checkpoint's state does not match its CRC"
        except (ValueError, TypeError) as error:
            return f"the checkpoint cannot be read: {error}"
        if self.log.isEnabledFor(logging.INFO):
            self.log.info(
                "%s: %s (%s), attempt %d, %s",
                claim.queue,
                claim.task or "plain job",
                claim.id,
                claim.attempt,
                f"resumed at output {claim.offset}, checkpoint {claim.seq}" if claim.seq else "from the start",
                extra=about(claim.id, claim.execution),
            )
        request = Request(
            id=claim.id,
            payload=claim.payload,
            attempt=claim.attempt,
            execution=claim.execution,
            outputs=outputs,
            state=state,
            queue=claim.queue,
            submitted=claim.created,
        )
        return Admission(claim, request)

    def _outputs(self, claim: Claim) -> list[Any]:
        """What it has put out. Page by page: there may be a hundred thousand outputs, and others must not wait."""
        whole = Outputs()
        while whole.take(self.store.output_page(claim.id, whole.place)):
            self.between()
        return whole.values

    def _notice(self, *, degraded: bool) -> None:
        """Say when the pool's mode has changed; the script itself gives a worker of a degraded pool less."""
        if degraded != self._degraded:
            self._degraded = degraded
            text = (
                "the pool is degraded; at most half of the slots are filled" if degraded else "the pool is normal again"
            )
            self.log.warning("Worker %s: %s", self.worker, text)

    def _nothing_found(self, status: str) -> None:
        idle = time.monotonic() - self._idle_since
        unable = self.unable() if status == "blocked" else []
        if self.limits.burst and (status in ("ok", "suspended") or unable):
            if not self.settled():
                return
            left = f"; what waits for {', '.join(unable)} is left, which it could not load" if unable else ""
            self.log.info("Worker %s: done, quitting%s", self.worker, left)
            self.holdings.stop()
        elif self.limits.max_idle_time is not None and idle >= self.limits.max_idle_time:
            self.log.info("Worker %s: idle for %d seconds, quitting", self.worker, idle)
            self.holdings.stop()
