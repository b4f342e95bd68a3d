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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from ..protocol.logs import about
from ..protocol.records import Failure, Finish, Progress
from ..protocol.scripts import MAX_BYTES, MAX_REQUESTS
from ..protocol.settings import LEASE
from ..protocol.store import Store, memory_full, stored
from .claimer import Claimer
from .companion import Guarded
from .holding import Holding
from .holdings import Handback, Holdings
from .ledger import Ledger
from .mailbox import Drop
from .uploads import Uploads
from .watchdog import Counter

GIVE_UP = 5.0
"""Seconds that a stopping worker tries to reach Redis; after that the reaper hands its requests on."""

RECONNECT = 60.0
"""Seconds that a try to reach Redis may take during an outage: asking for its address has no timeout of ours."""

LOOK = 0.1
"""Seconds after which a courier that has nothing to store looks at what else there is to do."""

QUESTION_INTERVAL = 0.5
"""Seconds between two questions about requests whose step takes long."""


@dataclass(slots=True)
class Courier:
    """Stores, ends, hands back and claims, in rounds, in a thread of its own.

    ``tended`` looks after the guardian in every round; ``rejoined`` is called with the new incarnation after this
    worker was declared dead by mistake (a long stop, a network cut).
    """

    store: Store
    worker: str
    holdings: Holdings
    claimer: Claimer
    tended: Callable[[], Guarded]
    rejoined: Callable[[str], None]
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    counter: Counter = field(default_factory=Counter)
    """Ticked in every round, and before every call."""
    patience: float = 5.0
    """Seconds in which a call ends: answered, or given up."""

    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    failed: BaseException | None = None
    ledger: Ledger = field(init=False)
    _uploads: Uploads = field(init=False)
    _full: bool = False
    """Redis was at its maxmemory at the last checkpoint."""
    _last_flush: float = 0.0
    _last_renewal: float = 0.0
    _last_question: float = 0.0
    _outage: float | None = None
    _thread: threading.Thread | None = None
    _idle: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._uploads = Uploads(self.store, self._hear_of_progress)
        self.claimer.between = self._between
        self.store.calling = self._tick
        self.claimer.ledger = self.ledger = Ledger(self.holdings.settings.heartbeat, self.worker)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    @property
    def started(self) -> bool:
        """True once it may hold something."""
        return self._thread is not None

    def join(self) -> None:
        """Wait for the end of the thread."""
        assert self._thread is not None
        self._thread.join()

    # --- rounds ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._finished():
                self._round()
            self._leave()
        except BaseException as error:  # whatever it is, the main thread must hear of it and end the process
            self.failed = error
            self.log.critical("the courier stopped: %s", error, exc_info=True)
        finally:
            self.counter.tick(0)
            self.holdings.stop()

    def tend_idle(self) -> bool:
        """Look after the guardian while this worker claims nothing yet; False if it must not claim at all."""
        with self._idle:
            if self.holdings.stopping:
                return True  # it signs off in this moment: what the guardian says is of that
            guarded = self.tended()
            if guarded is Guarded.REAPED:
                self._rejoin()
            elif guarded is Guarded.OUTDATED:
                self._outdated()
            return guarded is not Guarded.OUTDATED

    def settle_idle(self) -> None:
        """After the stop, before signing off: :attr:`incarnation` is the last one that was begun."""
        with self._idle:
            pass

    def _outdated(self) -> None:
        self.log.error("Worker %s: Redis holds a newer protocol; upgrade this worker", self.worker)
        self.holdings.stop()

    def _tick(self) -> None:
        """The courier moves. A server that is looked for may be found late: resolvers have timeouts of their own."""
        allowed = max(self.holdings.settings.step_timeout, 2 * self.patience + 1)
        self.counter.tick(allowed if self._outage is None else max(allowed, RECONNECT))

    def _round(self) -> None:
        """Wait, store, end, hand back, claim. A connection error costs a pause, never a request."""
        self._tick()
        guarded = self.tended()
        self._wait()
        try:
            if guarded is Guarded.OUTDATED:
                self._outdated()
            elif guarded is Guarded.REAPED and not self.holdings.plain:
                self._rejoin()
            self._adopt_lease()
            self._store_progress()
            self._renew()
            self._end()
            self._stop()
            self._confirm_cancels()
            self._release()
            if not self.claimer.claim(self.incarnation):
                self._rejoin()
            self.ledger.flush(self.store, self.incarnation)
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
        holdings = self.holdings
        if holdings.stopping_since is None:
            return False
        if holdings.cold or holdings.parked.is_set() or not holdings.held:
            return True
        if holdings.plain:
            return False  # RQ's warm stop lets a plain job end, however long it takes
        return time.monotonic() - holdings.stopping_since > holdings.settings.drain_timeout

    def _wait(self) -> None:
        """Until there is something to do: an end, a stop, or the next checkpoint."""
        holdings = self.holdings
        with holdings.lock:
            if not holdings.urgent and holdings.held and not self._uploads.busy:
                interval = holdings.settings.checkpoint_interval
                due = self._last_flush + interval - time.monotonic()
                if due <= 0 and not any(item.unsent for item in holdings.held.values()):
                    # Nothing to store yet: the next step is stored as soon as it is there. Asking again and again
                    # would take the interpreter from the step that is waited for.
                    due = max(interval, LOOK)
                    holdings.hungry = True
                if due > 0:
                    holdings.lock.wait(min(due, 0.5))
                holdings.hungry = False
            if holdings.urgent:
                self._last_flush = 0.0
            holdings.urgent = False

    def _adopt_lease(self) -> None:
        """Leases are as long as the task's step timeout asks; those given with another length are renewed at once."""
        with self.holdings.lock:
            settings = self.holdings.task_settings()
            if settings.lease != self.store.settings.lease:
                self.store.settings = settings
                self._last_renewal = 0.0

    # --- what is stored ----------------------------------------------------------------------------

    def _store_progress(self) -> None:
        """Checkpoint what has come since the last checkpoint, once per interval, and before an end."""
        now = time.monotonic()
        holdings = self.holdings
        with holdings.lock:
            due = now - self._last_flush >= holdings.settings.checkpoint_interval
            if not due and not self._uploads.busy:
                return
            # A finish takes its last outputs along; it needs no checkpoint of its own before.
            rows = [row for item in holdings.held.values() if (row := item.next_progress(due=due))]
            if due and (rows or not self._last_flush):
                self._last_flush = now
        try:
            for chunk in _chunks(self._uploads.advance(rows), _size):
                self._send_progress(chunk)
        except redis.ResponseError as error:
            if not memory_full(error):
                raise
            self._give_way(error)
        else:
            self._full = self._full and not rows

    def _send_progress(self, rows: Sequence[Progress]) -> None:
        holdings = self.holdings
        with holdings.lock:
            mine = [holdings.current(row.id, row.execution) for row in rows]
            for holding in filter(None, mine):
                holding.sendings += 1
        began = time.monotonic()
        try:
            answers = self.store.progress(self.incarnation, rows)
        except redis.ResponseError as error:
            if memory_full(error):
                for holding in filter(None, mine):
                    holding.sendings -= 1  # refused before it wrote anything
            raise
        self.ledger.answered(time.monotonic() - began)
        with holdings.lock:
            for row, answer in zip(rows, answers, strict=True):
                self._hear_of_progress(row, answer)
            holdings.lock.notify_all()

    def _hear_of_progress(self, row: Progress, answer: str) -> None:
        """Act upon the answer to a checkpoint, or to a chunk of its state."""
        with self.holdings.lock:
            holding = self.holdings.current(row.id, row.execution)
            if holding is None:
                return
            holding.shown = True
            if answer == "ok" and holding.flight is row:
                self.ledger.stored(holding, row)
                holding.confirm()
            elif answer == "missing":
                self.log.warning(
                    "request %s: Redis has lost parts of a state on its way; written again", row.id,
                    extra=about(*holding.key),
                )  # fmt: skip
                self._uploads.again(row)
            self._hear(holding, answer)

    def _give_way(self, error: redis.ResponseError) -> None:
        """Redis is at its maxmemory: what is to be stored waits here, and the leases are renewed alone."""
        if not self._full:
            self.log.warning("Redis takes no checkpoints (%s); they wait here, and are tried again", error)
        self._full = True
        self._uploads.busy = False  # with the next checkpoint
        self.holdings.excuse()

    def _between(self) -> None:
        """Called by the claimer while it reads a long state: all leases are to live on meanwhile."""
        self.holdings.excuse()
        self._renew()

    def _renew(self) -> None:
        """Renew now and then the leases of all that has moved, also of requests that put nothing out."""
        holdings, now = self.holdings, time.monotonic()
        with holdings.lock:
            holdings.tell_stored()
            rows = [item for item in holdings.held.values() if not item.claim.plain]
            loading = now < holdings.loading_until
            interval = LEASE * min(holdings.step_timeouts()) / 10
            keys = [item.key for item in rows if loading or holdings.last_moved(item) > self._last_renewal]
            # What has put out nothing yet: RQ's tools are to see it all the same.
            late = now - holdings.settings.checkpoint_interval
            unseen = [item for item in rows if not item.shown and item.began <= late and not item.leaving]
            slow = [item.key for item in rows if item.claim.id in (holdings.apart or ())]
        if keys and now - self._last_renewal >= interval:
            self._call_in_parts(keys, lambda part: self.store.renew(self.incarnation, part))
            self.ledger.renewed(len(keys))
            # Not before: what was not renewed in an outage is renewed after it, moved or not.
            self._last_renewal = now
        elif unseen:
            self._call_in_parts([item.key for item in unseen], lambda part: self.store.renew(self.incarnation, part))
        for item in unseen:
            item.shown = True
        if slow and now - self._last_question >= min(QUESTION_INTERVAL, interval):
            # A step that takes long, or hangs, sends nothing; its cancellation or loss is heard all the same.
            self._call_in_parts(slow, self.store.standing)
            self._last_question = now

    def _call_in_parts(
        self, keys: Sequence[tuple[str, str]], call: Callable[[Sequence[tuple[str, str]]], list[str]]
    ) -> None:
        """Ask about requests, as many at a time as one call takes, and act upon the answers."""
        for start in range(0, len(keys), MAX_REQUESTS):
            part = keys[start : start + MAX_REQUESTS]
            answers = call(part)
            with self.holdings.lock:
                for (name, execution), answer in zip(part, answers, strict=True):
                    if holding := self.holdings.current(name, execution):
                        self._hear(holding, answer)

    def _hear(self, holding: Holding, answer: str) -> None:
        """Act upon what Redis says of one holding (lock held)."""
        name = holding.claim.id
        if answer == "cancel" and not holding.canceling and not holding.finishing:
            holding.cancel()
            self.holdings.urgent = True
            self.holdings.mailbox.put(Drop(name))
        elif answer == "lost":
            self.log.warning("request %s was given to another worker; dropped here", name, extra=about(*holding.key))
            self.holdings.let_go(name)
        elif answer == "deadline":
            self.log.warning("request %s: its deadline has passed; it was ended", name, extra=about(*holding.key))
            self.ledger.left(holding, "failed", "DEADLINE")
            self.holdings.let_go(name)
        elif answer.startswith("gap"):
            # Redis has lost its last second: what it has is the truth, and a new claim goes on from there.
            self.log.warning(
                "request %s: Redis holds fewer outputs than it had confirmed; handed back", name,
                extra=about(*holding.key),
            )  # fmt: skip
            self.holdings.handbacks.append(Handback(holding, "Redis lost outputs that it had confirmed"))

    # --- what ends ---------------------------------------------------------------------------------

    def _end(self) -> None:
        """Send finishes and failures whose outputs are all stored."""
        holdings = self.holdings
        with holdings.lock:
            ready = [item for item in holdings.held.values() if item.leaving and not item.flight and not item.canceling]
            finishes = [item.next_finish(holdings.settings) for item in ready if not isinstance(item.ended, Failure)]
            failures = [item.ended for item in ready if isinstance(item.ended, Failure) and not item.unsent]
        for chunk in _chunks(finishes, lambda row: len(row.blob) + len(row.result)):
            self._settle(chunk, self.store.finish(self.incarnation, self.worker, chunk))
        for start in range(0, len(failures), MAX_REQUESTS):
            part = failures[start : start + MAX_REQUESTS]
            self._settle(part, self.store.fail(self.incarnation, self.worker, part))

    def _settle(self, rows: Sequence[Finish | Failure], answers: list[str]) -> None:
        holdings = self.holdings
        with holdings.lock:
            for row, answer in zip(rows, answers, strict=True):
                holding = holdings.current(row.id, row.execution)
                if holding is None:
                    continue
                if answer.startswith("gap"):
                    holding.ended = None
                    self._hear(holding, answer)
                    continue
                del holdings.held[row.id]
                holdings.wanting = True
                who = about(row.id, row.execution)
                if isinstance(row, Failure):
                    if answer != "lost":
                        self.ledger.left(holding, "failed", row.kind)
                    self.log.warning(
                        "%s: %s (%s): %s; %s", row.kind, holding.claim.task, row.id, row.reason, answer, extra=who
                    )
                elif answer == "lost":
                    self.log.warning(
                        "request %s was given to another worker; its result here is dropped", row.id, extra=who
                    )
                else:
                    self.ledger.finished(holding, row)
                    self.log.info("%s: OK (%s), %.2f s", holding.claim.queue, row.id, row.seconds, extra=who)
            holdings.lock.notify_all()

    def _stop(self) -> None:
        """Say in Redis which requests RQ's stop commands have named; they end as canceled ones do."""
        with self.holdings.lock:
            held = self.holdings.held.values()
            keys = [item.key for item in held if item.stopping and not item.canceling and not item.finishing]
        for start in range(0, len(keys), MAX_REQUESTS):
            part = keys[start : start + MAX_REQUESTS]
            answers = self.store.stop(self.incarnation, part)
            with self.holdings.lock:
                for (name, execution), answer in zip(part, answers, strict=True):
                    if holding := self.holdings.current(name, execution):
                        self._hear(holding, answer)

    def _confirm_cancels(self) -> None:
        with self.holdings.lock:
            keys = [item.key for item in self.holdings.held.values() if item.canceling]
        for start in range(0, len(keys), MAX_REQUESTS):
            part = keys[start : start + MAX_REQUESTS]
            self.store.cancel(part, reason="canceled while running", incarnation=self.incarnation, worker=self.worker)
            with self.holdings.lock:
                for name, execution in part:
                    self.log.info("canceled (%s)", name, extra=about(name, execution))
                    if holding := self.holdings.current(name, execution):
                        self.ledger.left(holding, "canceled")
                    self.holdings.let_go(name)

    def _release(self) -> None:
        holdings = self.holdings
        with holdings.lock:
            waiting = list(holdings.handbacks)
        # From last to first: each goes to the front of its queue.
        for entry in reversed(waiting):
            name = entry.holding.claim.id
            mine = holdings.current(name, entry.holding.claim.execution) is entry.holding
            if mine:
                answers = self.store.release(
                    self.incarnation,
                    self.worker,
                    [entry.holding.key],
                    reason=entry.reason,
                    delay=entry.delay,
                    fingerprints=[entry.fingerprint],
                )
                if answers[0] != "lost":
                    self.ledger.left(entry.holding, "released")
                self.log.warning(
                    "handed back (%s): %s; %s", name, entry.reason, answers[0], extra=about(*entry.holding.key)
                )
            with holdings.lock:
                holdings.handbacks.remove(entry)
                if mine:
                    holdings.let_go(name)

    # --- outages, a false death, and the end -------------------------------------------------------

    def _rejoin(self) -> None:
        """Declared dead: all that this incarnation held runs elsewhere. Go on under a new one."""
        holdings = self.holdings
        with holdings.lock:
            self.log.warning(
                "Worker %s was declared dead (no heartbeat reached Redis in time); %d request(s) dropped, rejoining",
                self.worker,
                len(holdings.held),
            )
            for name in list(holdings.held):
                holdings.let_go(name)
            holdings.handbacks.clear()
            self.incarnation = uuid.uuid4().hex
        self.rejoined(self.incarnation)

    def _in_contact(self) -> None:
        now = time.monotonic()
        if self._outage is not None:
            self.log.warning("Redis is back after %.1f s", now - self._outage)
            self._outage = None
        with self.holdings.lock:
            self.holdings.contact = now
            self.holdings.lock.notify_all()

    def _ride_out(self, error: Exception) -> None:
        now = time.monotonic()
        if self._outage is None:
            self._outage = now
            self.log.warning("no contact to Redis (%s); requests go on, results wait here", error)
        self.store.connection.connection_pool.disconnect()
        with self.holdings.lock:
            # Capped, and jittered so that a pool of workers does not come back in one moment.
            delay = min(1.0, 0.05 + 0.25 * (now - self._outage)) * random.uniform(0.5, 1.0)
            self.holdings.lock.wait(delay)

    def _leave(self) -> None:
        """Store what is there and hand the rest back, in the order of the claims; bounded in time."""
        deadline = time.monotonic() + GIVE_UP
        # A frozen server answers nothing: each try must end well within the deadline.
        pool = self.store.connection.connection_pool
        pool.connection_kwargs["socket_timeout"] = GIVE_UP / 2
        pool.disconnect()
        while True:
            try:
                self._last_flush = 0.0
                self._store_progress()
                while self._uploads.busy and time.monotonic() < deadline:
                    self._store_progress()
                self._end()
                self._confirm_cancels()
                self._release_all("its worker was stopped")
                self.ledger.flush(self.store, self.incarnation, last=True)
                return
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    self.log.error("Redis did not answer while stopping (%s); the reaper hands the requests on", error)
                    return
                self._ride_out(error)

    def _release_all(self, reason: str) -> None:
        holdings = self.holdings
        with holdings.lock:
            rest = [item.key for item in holdings.held.values() if not item.claim.plain]
        # Parts too from last to first, for the order in front of the queue.
        for part in reversed([rest[start : start + MAX_REQUESTS] for start in range(0, len(rest), MAX_REQUESTS)]):
            self.store.release(self.incarnation, self.worker, part, reason=reason)
            with holdings.lock:
                for name, _ in part:
                    if holding := holdings.held.pop(name, None):
                        self.ledger.left(holding, "released")
        if rest:
            self.log.info("Worker %s: %d request(s) handed back", self.worker, len(rest))


def _size(row: Progress) -> int:
    state = stored(row.state)
    return len(row.blob) + (0 if state.chunks else state.length)


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
