"""The courier: the one thread of a worker that talks to Redis for its requests.

The engine loop hands it steps and never waits for Redis; the courier claims, checkpoints, finishes
and hands back. It sends every call once and decides itself what to send again: a call whose reply was
lost is repeated verbatim, and Redis answers as it did the first time.

During an outage the loop goes on into a bounded buffer. It pauses when the buffer is full, or when by
this process' own clock its leases must be over; nothing is dropped until Redis says that it is lost.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from ..protocol.errors import PerdureError
from ..protocol.keys import key
from ..protocol.records import Claim, Failure, Finish
from ..protocol.scripts import MAX_BYTES, MAX_REQUESTS
from ..protocol.settings import Settings
from ..protocol.store import Store
from .holding import Holding
from .mailbox import Admission, Drop, Mailbox, Stop
from .tasks import Request, Step

MAX_BUFFER = 32 * 1024 * 1024
"""Bytes of unsent outputs after which the engine loop pauses."""

GIVE_UP = 5.0
"""Seconds that a stopping worker tries to reach Redis; after that the reaper hands its requests on."""

NO_CHECKPOINT = "damaged"
"""Stands for the fingerprint of a checkpoint that cannot be read; no worker ever shows it, so the request
restarts from zero."""


@dataclass(slots=True)
class Limits:
    """What ends a worker by itself: RQ's ``--burst``, ``--max-jobs``, ``--max-idle-time`` (seconds)."""

    burst: bool = False
    max_jobs: int | None = None
    max_idle_time: float | None = None


@dataclass(slots=True)
class Courier:
    """Claims, checkpoints, finishes and hands back, in a thread of its own.

    ``rejoined`` is called with the new incarnation after this worker was declared dead by mistake (a long
    stop, a network cut); ``tended`` in every round.
    """

    store: Store
    worker: str
    queues: Callable[[], list[str]]
    mailbox: Mailbox
    rejoined: Callable[[str], None]
    tended: Callable[[], None]
    limits: Limits = field(default_factory=Limits)
    resume: bool = True
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))

    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    held: dict[str, Holding] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    task: str = ""
    claimed: int = 0
    failed: BaseException | None = None
    parked: threading.Event = field(default_factory=threading.Event)

    _settings: Settings = field(init=False)
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _step_timeouts: dict[str, float | None] = field(default_factory=dict)
    _stopping: float | None = None
    _cold: bool = False
    _urgent: bool = False
    _fill: bool = True
    _steps: int = 0
    _renewed_steps: int = 0
    _loading_until: float = 0.0
    _last_flush: float = 0.0
    _last_renewal: float = 0.0
    _last_contact: float = 0.0
    _idle_since: float = field(default_factory=time.monotonic)
    _outage: float | None = None
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._settings = self.store.settings
        self._last_contact = time.monotonic()

    # --- for the engine loop and the main thread ---------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; True if it has ended. ``timeout`` in seconds."""
        assert self._thread is not None
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self, *, cold: bool = False) -> None:
        """Stop claiming, store what is there, hand back what is held, end. ``cold`` waits for no step.

        Only sets flags: it may be called from anywhere but a signal handler that interrupted the courier.
        """
        with self._condition:
            if self._stopping is None:
                self._stopping = time.monotonic()
                self.mailbox.put(Stop())
            self._cold = self._cold or cold
            self._urgent = True
            self._condition.notify_all()

    @property
    def started(self) -> bool:
        """True once it may hold something."""
        return self._thread is not None

    @property
    def stopping(self) -> bool:
        """True once :meth:`stop` was called."""
        return self._stopping is not None

    def loading(self, seconds: float) -> None:
        """Leases are renewed for so many seconds without a step: a model is being loaded. 0 ends it."""
        with self._condition:
            self._loading_until = time.monotonic() + seconds if seconds else 0.0
            self._steps += 1

    def loaded(self, path: str, slots: int, step_timeout: float | None) -> None:
        """A task is ready: how many of its requests fit, and how long one of its steps may take (seconds)."""
        with self._condition:
            self.slots[path] = slots
            self._step_timeouts[path] = step_timeout
            self._adopt(path)
            self._fill = self._urgent = True
            self._condition.notify_all()

    def _adopt(self, path: str) -> None:
        """Leases are those of this task from now on; those that were given with another length are renewed at once."""
        settings = self._settings.replace(step_timeout=self._step_timeouts.get(path))
        if path == self.task and settings.lease != self.store.settings.lease:
            self.store.settings = settings
            self._last_renewal = 0.0

    def offer(self, steps: Iterable[Step], executions: Mapping[str, str]) -> list[str]:
        """Take the steps of one turn of the engine; returns ids of requests that must be dropped from it.

        Those are requests whose output, state or result cannot be stored. ``executions``: for which execution
        each request was admitted; a step of an older one is not this execution's.
        """
        broken = []
        with self._condition:
            self._steps += 1
            for step in steps:
                holding = self._current(step.request_id, executions.get(step.request_id, ""))
                if holding is None or holding.leaving:
                    continue
                try:
                    holding.add(step, self._settings)
                except PerdureError as error:
                    holding.fail(error)
                    self._urgent = True
                    if not step.ends:
                        broken.append(step.request_id)
                self._urgent = self._urgent or step.ends
            if self._urgent:
                self._condition.notify_all()
        return broken

    def fail(self, identifier: str, execution: str, error: BaseException) -> None:
        """End a request's execution with a failure."""
        with self._condition:
            holding = self._current(identifier, execution)
            if holding is not None and not holding.leaving:
                holding.fail(error)
                self._urgent = True
                self._condition.notify_all()

    def hand_back(self, claim: Claim, *, reason: str, delay: float, fingerprint: str = "") -> None:
        """Release a request that this worker cannot run; ``delay`` in seconds before another may."""
        with self._condition:
            if holding := self._current(claim.id, claim.execution):
                self._releases.append((holding, reason, delay, fingerprint))
            self._urgent = True
            self._condition.notify_all()

    def accept(self, claim: Claim, fingerprint: str) -> None:
        """The engine has taken a request in; its checkpoints will carry this fingerprint."""
        with self._condition:
            if holding := self._current(claim.id, claim.execution):
                holding.fingerprint = fingerprint
            self._steps += 1

    def _current(self, identifier: str, execution: str) -> Holding | None:
        """The holding of exactly this execution (lock held): a request that was lost may be held again."""
        holding = self.held.get(identifier)
        return holding if holding is not None and holding.claim.execution == execution else None

    def ended_plain(self, identifier: str) -> None:
        """RQ's own code has ended a plain job."""
        with self._condition:
            self.held.pop(identifier, None)
            self._fill = self._urgent = True
            self._condition.notify_all()

    def wait_stored(self, identifiers: Sequence[str]) -> None:
        """Wait until all that these requests have put out is in Redis, or they are lost or stopped."""
        with self._condition:
            self._urgent = True
            self._condition.notify_all()

            def stored() -> bool:
                rest = [self.held[name] for name in identifiers if name in self.held]
                return self.stopping or not any(item.unsent for item in rest)

            self._last_flush = 0.0
            self._condition.wait_for(stored)

    def pause(self) -> bool:
        """Wait while the engine must not step; True if it may go on, False when the worker stops."""
        with self._condition:
            self._condition.wait_for(lambda: self.stopping or not self._overdue(), timeout=1.0)
            return not self.stopping

    def overdue(self) -> bool:
        """True while the engine must not step: the buffer is full, or the leases must be over."""
        with self._condition:
            return self._overdue()

    def _overdue(self) -> bool:
        if time.monotonic() - self._last_contact > self.store.settings.lease:
            return bool(self.held)
        return sum(holding.size for holding in self.held.values()) > MAX_BUFFER

    # --- the thread --------------------------------------------------------------------------------

    _releases: list[tuple[Holding, str, float, str]] = field(default_factory=list)

    def _run(self) -> None:
        try:
            while not self._finished():
                self._turn()
            self._leave()
        except BaseException as error:  # whatever it is, the main thread must hear of it and end the process
            self.failed = error
            self.log.critical("the courier stopped: %s", error, exc_info=True)
        finally:
            with self._condition:
                if self._stopping is None:
                    self._stopping = time.monotonic()
                self._condition.notify_all()
            self.mailbox.put(Stop())

    def _turn(self) -> None:
        """One round: wait, store, end, hand back, claim. A connection error costs a pause, never a request."""
        self.tended()
        self._wait()
        try:
            self._store_progress()
            self._end()
            self._confirm_cancels()
            self._release()
            self._claim()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._ride_out(error)
        except redis.ResponseError as error:
            # BUSY, LOADING and the like pass; a broken script would repeat itself, so it is shown each time.
            self.log.error("Redis refused a call: %s", error)
            self._ride_out(error)
        else:
            self._in_contact()

    def _finished(self) -> bool:
        """True when nothing is left to do but to leave."""
        if self._stopping is None:
            return False
        if self._cold or self.parked.is_set() or not self.held:
            return True
        if any(holding.claim.plain for holding in self.held.values()):
            return False  # RQ's warm stop lets a plain job end, however long it takes
        return time.monotonic() - self._stopping > self._settings.drain_timeout

    def _wait(self) -> None:
        """Until there is something to do: an end, a stop, or the next checkpoint."""
        with self._condition:
            if self._urgent or not self.held:
                self._urgent = False
                return
            due = self._last_flush + self._settings.checkpoint_interval - time.monotonic()
            if due > 0:
                self._condition.wait(min(due, 0.5))
            self._urgent = False

    def _store_progress(self) -> None:
        """Checkpoint what has come, and renew the leases of the rest while the loop moves."""
        now = time.monotonic()
        with self._condition:
            ending = any(holding.leaving for holding in self.held.values())
            if not ending and now - self._last_flush < self._settings.checkpoint_interval and not self.stopping:
                return
            self._last_flush = now
            # A finish takes its last outputs along; it needs no checkpoint of its own before.
            rows = [row for item in self.held.values() if not item.finishing and (row := item.next_progress())]
        for chunk in _chunks(rows, lambda row: len(row.blob) + len(row.state or b"")):
            answers = self.store.progress(self.incarnation, chunk)
            with self._condition:
                for row, answer in zip(chunk, answers, strict=True):
                    holding = self.held.get(row.id)
                    if holding is None or holding.claim.execution != row.execution:
                        continue
                    if answer in ("ok", "cancel"):
                        holding.confirm()
                    self._hear(holding, answer)
                self._condition.notify_all()
        self._renew(now, {row.id for row in rows})

    def _renew(self, now: float, stored: set[str]) -> None:
        with self._condition:
            moving = self._steps != self._renewed_steps or now < self._loading_until
            rest = [item.key for name, item in self.held.items() if name not in stored and not item.claim.plain]
            if not rest or not moving or now - self._last_renewal < self.store.settings.lease / 10:
                return
            self._renewed_steps, self._last_renewal = self._steps, now
        for start in range(0, len(rest), MAX_REQUESTS):
            chunk = rest[start : start + MAX_REQUESTS]
            answers = self.store.renew(self.incarnation, chunk)
            with self._condition:
                for (name, _), answer in zip(chunk, answers, strict=True):
                    if holding := self.held.get(name):
                        self._hear(holding, answer)

    def _hear(self, holding: Holding, answer: str) -> None:
        """Act upon what Redis says of one holding (lock held)."""
        name = holding.claim.id
        if answer == "cancel" and not holding.leaving:
            holding.canceling = True
            self.mailbox.put(Drop(name))
        elif answer == "lost":
            self.log.warning("request %s was given to another worker; dropped here", name)
            self._let_go(name)
        elif answer.startswith("gap"):
            # Redis has lost its last second: what it has is the truth, and a new claim goes on from there.
            self.log.warning("request %s: Redis holds fewer outputs than it had confirmed; handed back", name)
            self._releases.append((holding, "Redis lost outputs that it had confirmed", 0.0, ""))

    def _let_go(self, name: str) -> None:
        self.held.pop(name, None)
        self._fill = True
        self.mailbox.put(Drop(name))
        self._condition.notify_all()

    def _end(self) -> None:
        """Send finishes and failures whose outputs are all stored."""
        with self._condition:
            ready = [item for item in self.held.values() if item.leaving and item.flight is None and not item.canceling]
            finishes = [item.next_finish(self._settings) for item in ready if not isinstance(item.ended, Failure)]
            failures = [
                item.ended
                for item in ready
                if isinstance(item.ended, Failure) and not item.pending and item.state is None
            ]
        for chunk in _chunks(finishes, lambda row: len(row.blob) + len(row.result)):
            self._settle(chunk, self.store.finish(self.incarnation, self.worker, chunk))
        for start in range(0, len(failures), MAX_REQUESTS):
            part = failures[start : start + MAX_REQUESTS]
            self._settle(part, self.store.fail(self.incarnation, self.worker, part))

    def _settle(self, rows: Sequence[Finish | Failure], answers: list[str]) -> None:
        with self._condition:
            for row, answer in zip(rows, answers, strict=True):
                holding = self.held.get(row.id)
                if holding is None:
                    continue
                if answer.startswith("gap"):
                    holding.ended = None
                    self._hear(holding, answer)
                    continue
                self.held.pop(row.id)
                self._fill = True
                if isinstance(row, Failure):
                    self.log.warning("%s: %s (%s): %s; %s", row.kind, holding.claim.task, row.id, row.reason, answer)
                elif answer == "lost":
                    self.log.warning("request %s was given to another worker; its result here is dropped", row.id)
                else:
                    self.log.info("%s: OK (%s), %.2f s", holding.claim.queue, row.id, row.seconds)

    def _confirm_cancels(self) -> None:
        with self._condition:
            rows = [item.key for item in self.held.values() if item.canceling]
        if rows:
            self.store.cancel(rows, reason="canceled while running", incarnation=self.incarnation, worker=self.worker)
            with self._condition:
                for name, _ in rows:
                    self.log.info("canceled (%s)", name)
                    self._let_go(name)

    def _release(self) -> None:
        with self._condition:
            waiting = list(self._releases)
        # From last to first: each goes to the front of its queue.
        for entry in reversed(waiting):
            holding, reason, delay, fingerprint = entry
            mine = self.held.get(holding.claim.id) is holding
            if mine:
                answers = self.store.release(
                    self.incarnation, self.worker, [holding.key], reason=reason, delay=delay, fingerprints=[fingerprint]
                )
                self.log.warning("handed back (%s): %s; %s", holding.claim.id, reason, answers[0])
            with self._condition:
                self._releases.remove(entry)
                if mine:
                    self._let_go(holding.claim.id)

    # --- claiming ----------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Fill free slots; an idle worker blocks on its bells first, a busy one looks at every checkpoint."""
        if self._stopping is not None:
            return None
        with self._condition:
            busy = bool(self.held)
            if not busy:
                self.task = ""
            free = self.slots.get(self.task, 1) - len(self.held) if busy else 1
            if self.limits.max_jobs is not None:
                free = min(free, self.limits.max_jobs - self.claimed)
                if free <= 0 and not busy:
                    return self.stop()
            if free <= 0 or (busy and any(item.claim.plain for item in self.held.values())):
                return None
            queues, fill = self.queues(), self._fill
        if not busy and not fill and not self.limits.burst:
            self.store.connection.blpop([key("bell", queue) for queue in queues], timeout=1)
            if self.stopping:
                return None
        slots = self.slots
        if self.limits.max_jobs is not None:
            slots = {path: min(number, self.limits.max_jobs - self.claimed) for path, number in slots.items()}
        answer = self.store.claim(
            incarnation=self.incarnation,
            worker=self.worker,
            queues=queues,
            task=self.task,
            free=free,
            slots=slots,
            known=list(self.held),
            resume=self.resume,
        )
        if answer.status == "reaped":
            return self._rejoin()
        self._fill = answer.status == "more" and bool(answer.claims)
        self._receive(answer.claims)
        if not answer.claims and not busy:
            self._nothing_found(answer.status)
        return None

    def _receive(self, claims: list[Claim]) -> None:
        admissions = [self._admission(claim) for claim in claims]
        with self._condition:
            for claim, admission in zip(claims, admissions, strict=True):
                self.held[claim.id] = Holding.of(claim)
                self.task = claim.task
                self.claimed += 1
                if isinstance(admission, str):
                    self._releases.append((self.held[claim.id], admission, 0.0, NO_CHECKPOINT))
                    self._urgent = True
                else:
                    self.mailbox.put(admission)
            if claims:
                self._idle_since = time.monotonic()
                self._last_renewal = time.monotonic()
                self._adopt(self.task)

    def _admission(self, claim: Claim) -> Admission | str:
        """The request as the task will see it, with what its checkpoint holds; a text if that is damaged."""
        outputs: list[Any] = []
        state: Any = None
        try:
            if claim.offset:
                outputs = self.store.all_outputs(claim.id)
                if len(outputs) != claim.offset:
                    return f"the checkpoint names {claim.offset} outputs, but {len(outputs)} are stored"
            if claim.seq:
                state, sound = self.store.state(claim.id)
                if not sound:
                    return "the checkpoint's state does not match its CRC"
        except (ValueError, TypeError) as error:
            return f"the checkpoint cannot be read: {error}"
        self.log.info(
            "%s: %s (%s), attempt %d, %s", claim.queue, claim.task or "plain job", claim.id, claim.attempt,
            f"resumed at output {claim.offset}, checkpoint {claim.seq}" if claim.seq else "from the start",
        )  # fmt: skip
        request = Request(
            id=claim.id, payload=claim.payload, attempt=claim.attempt, execution=claim.execution, outputs=outputs,
            state=state, queue=claim.queue,
        )  # fmt: skip
        return Admission(claim, request)

    def _nothing_found(self, status: str) -> None:
        idle = time.monotonic() - self._idle_since
        if self.limits.burst and status in ("ok", "suspended"):
            self.log.info("Worker %s: done, quitting", self.worker)
            self.stop()
        elif self.limits.max_idle_time is not None and idle >= self.limits.max_idle_time:
            self.log.info("Worker %s: idle for %d seconds, quitting", self.worker, idle)
            self.stop()

    def _rejoin(self) -> None:
        """Declared dead: all that this incarnation held runs elsewhere. Go on under a new one."""
        with self._condition:
            self.log.warning(
                "Worker %s was declared dead (no heartbeat reached Redis in time); %d request(s) dropped, rejoining",
                self.worker,
                len(self.held),
            )
            for name in list(self.held):
                self._let_go(name)
            self._releases.clear()
            self.incarnation = uuid.uuid4().hex
        self.rejoined(self.incarnation)

    # --- outages and the end -----------------------------------------------------------------------

    def _in_contact(self) -> None:
        now = time.monotonic()
        if self._outage is not None:
            self.log.warning("Redis is back after %.1f s", now - self._outage)
            self._outage = None
        with self._condition:
            self._last_contact = now
            self._condition.notify_all()

    def _ride_out(self, error: Exception) -> None:
        now = time.monotonic()
        if self._outage is None:
            self._outage = now
            self.log.warning("no contact to Redis (%s); requests go on, results wait here", error)
        self.store.connection.connection_pool.disconnect()
        with self._condition:
            # Capped, and jittered so that a pool of workers does not come back in one moment.
            delay = min(1.0, 0.05 + 0.25 * (now - self._outage)) * random.uniform(0.5, 1.0)
            self._condition.wait(delay)

    def _leave(self) -> None:
        """Store what is there and hand the rest back, in the order of the claims; bounded in time."""
        deadline = time.monotonic() + GIVE_UP
        while True:
            try:
                self._last_flush = 0.0
                self._store_progress()
                self._end()
                self._confirm_cancels()
                with self._condition:
                    rest = [item for item in self.held.values() if not item.claim.plain]
                for start in range(0, len(rest), MAX_REQUESTS):
                    part = rest[start : start + MAX_REQUESTS]
                    reason = "its worker was stopped"
                    self.store.release(self.incarnation, self.worker, [item.key for item in part], reason=reason)
                    with self._condition:
                        for item in part:
                            self.held.pop(item.claim.id, None)
                if rest:
                    self.log.info("Worker %s: %d request(s) handed back", self.worker, len(rest))
                return
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if time.monotonic() > deadline:
                    self.log.error("Redis did not answer while stopping (%s); the reaper hands the requests on", error)
                    return
                self._ride_out(error)


def _chunks(rows: Sequence[Any], size: Callable[[Any], int]) -> Iterable[list[Any]]:
    """Split rows by the limits of one call; one row alone may exceed the bytes."""
    part: list[Any] = []
    total = 0
    for row in rows:
        if part and (len(part) >= MAX_REQUESTS or total + size(row) > MAX_BYTES):
            yield part
            part, total = [], 0
        part.append(row)
        total += size(row)
    if part:
        yield part
