"""The courier: the one thread of a worker that talks to Redis for its requests.

The engine loop hands it steps and never waits for Redis; the courier claims, checkpoints, finishes
and hands back. It sends every call once and decides itself what to send again: a call whose reply was
lost is repeated verbatim, and Redis answers as it did the first time.

During an outage the loop goes on into a bounded buffer. It pauses when the buffer is full, or when by
this process' own clock its leases must be over; nothing is dropped until Redis says that it is lost.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import redis

from ...protocol.store import Store
from ...protocol.transport.refusals import passing, waited_for
from ..guardian.companion import Guarded
from ..guardian.watchdog import Counter
from ..leases.holdings import Holdings
from .checkpoints import Checkpoints
from .claimer import Claimer
from .endings import Endings
from .line import Line
from .renewals import Renewals

GIVE_UP = 5.0
"""Seconds that a stopping worker tries to reach Redis; after that the reaper hands its requests on."""

RECONNECT = 60.0
"""Seconds that a try to reach Redis may take during an outage: asking for its address has no timeout of ours."""

REFUSALS = 20
"""Rounds in succession that a call has ended which is no single request's, and which Redis does not take while it
answers others; then the worker ends.
"""

LOOK = 0.1
"""Seconds after which a courier that has nothing to store looks at what else there is to do."""


@dataclass(slots=True)
class Courier:
    """Stores, ends, hands back and claims, in rounds, in a thread of its own.

    ``tended`` looks after the guardian in every round; ``rejoined`` is called with the new incarnation after this
    worker was declared dead by mistake (a long stop, a network cut).
    """

    line: Line
    claimer: Claimer
    tended: Callable[[], Guarded]
    rejoined: Callable[[str], None]
    counter: Counter = field(default_factory=Counter)
    """Ticked in every round, and before every call."""
    patience: float = 5.0
    """Seconds in which a call ends: answered, or given up."""

    failed: BaseException | None = None
    checkpoints: Checkpoints = field(init=False)
    renewals: Renewals = field(init=False)
    endings: Endings = field(init=False)
    _outage: float | None = None
    _refusals: int = 0
    _claims_from: float = 0.0
    """When it may claim again after it was declared dead (monotonic seconds)."""
    _thread: threading.Thread | None = None
    _idle: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.line)
        self.renewals = Renewals(self.line)
        self.endings = Endings(self.line)
        self.claimer.between = self._between
        self.claimer.ledger = self.line.ledger
        self.line.store.calling = self._tick
        self.line.store.called = self.line.pace.took

    @property
    def store(self) -> Store:
        """For this thread only, while it runs."""
        return self.line.store

    @property
    def holdings(self) -> Holdings:
        """What this worker holds."""
        return self.line.holdings

    @property
    def incarnation(self) -> str:
        """Under which this worker holds requests; another one after it was declared dead by mistake."""
        return self.line.incarnation

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    @property
    def started(self) -> bool:
        """True once it may hold something."""
        return self._thread is not None

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the thread; False if it has not come after so many seconds."""
        assert self._thread is not None
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def end(self) -> bool:
        """Have it leave before this worker signs off: what it claimed afterwards would be lost with the process.

        The loop must not step any more. False if the thread does not end within the time that leaving may take.
        """
        if self._thread is None:
            return True
        self.holdings.parked.set()
        self.holdings.stop()
        return self.join(2 * GIVE_UP + self.patience)

    # --- rounds ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._finished():
                self._round()
            self._leave()
        except BaseException as error:  # whatever it is, the main thread must hear of it and end the process
            self.failed = error
            self.line.log.critical("the courier stopped: %s", error, exc_info=True)
        finally:
            self.claimer.bells.close()
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
        self.line.log.error("Worker %s: Redis holds a newer protocol; upgrade this worker", self.line.worker)
        self.holdings.stop()

    def _tick(self) -> None:
        """The courier moves. A server that is looked for may be found late: resolvers have timeouts of their own."""
        allowed = max(self.holdings.settings.step_timeout, 2 * self.patience + 1)
        self.counter.tick(allowed if self._outage is None else max(allowed, RECONNECT))

    def _round(self) -> None:
        """Wait, store, end, hand back, claim. A connection error costs a pause, never a request."""
        self._tick()
        guarded = self.tended()
        whole = self._wait()
        try:
            if guarded is Guarded.OUTDATED:
                self._outdated()
            elif guarded is Guarded.REAPED and not self.holdings.plain:
                self._rejoin()
            self.renewals.adopt_lease()
            self.checkpoints.store()
            if whole:
                self.renewals.renew()
                self.endings.end()
                self.endings.stop()
                self.endings.confirm_cancels()
                self.endings.release()
                if time.monotonic() >= self._claims_from and not self.claimer.claim(self.incarnation):
                    self._rejoin()
            self._show()
        except redis.RedisError as error:
            if not passing(error) and not waited_for(error):
                self.line.log.error("Redis refused a call: %s", error)  # a broken script, say: shown each time
            self._count_refusal(error)
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

    def _wait(self) -> bool:
        """Until there is something to do: an end, a stop, or the next checkpoint. False if it is only that somebody
        listens to what was put out.
        """
        holdings = self.holdings
        whole = True
        with holdings.lock:
            if not holdings.urgent and holdings.held and not self.checkpoints.uploads.busy:
                due = self.checkpoints.due_in()
                if due <= 0 and not any(item.unsent for item in holdings.held.values()):
                    # Nothing to store yet: the next step is stored as soon as it is there. Asking again and again
                    # would take the interpreter from the step that is waited for.
                    due = max(holdings.settings.checkpoint_interval, LOOK)
                    holdings.hungry = True
                # A step may take longer than an interval: what else is due must not wait behind what is heard.
                whole = self._sleep(min(due, 0.5)) or self.checkpoints.due_in() <= 0
                holdings.hungry = False
            elif not holdings.urgent and not holdings.held:
                pause = self._claims_from - time.monotonic()
                if pause > 0:
                    holdings.lock.wait(min(pause, 0.5))
            if holdings.urgent:
                self.checkpoints.hasten()
            holdings.urgent = False
        return whole

    def _sleep(self, seconds: float) -> bool:
        """Until somebody rings, or so many seconds (lock held); False when what somebody listens to may be stored."""
        holdings = self.holdings
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if holdings.prompt and not holdings.urgent:
                left = min(left, self.checkpoints.prompt_in())
                if left <= 0:
                    return False
            holdings.lock.wait(left)
            if not holdings.prompt or holdings.urgent:
                break
        return True

    def _between(self) -> None:
        """Called by the claimer while it reads a long log or state: what else is held is to go on meanwhile."""
        self._tick()
        self.holdings.excuse()
        self.checkpoints.store()
        self.renewals.renew()
        self.endings.end()
        self.endings.stop()
        self.endings.confirm_cancels()
        self.endings.release()

    # --- outages, a false death, and the end -------------------------------------------------------

    def _rejoin(self) -> None:
        """Declared dead: all that this incarnation held runs elsewhere. Go on under a new one, unless it is to end."""
        holdings = self.holdings
        with holdings.lock:
            if holdings.stopping:
                for name in list(holdings.held):
                    holdings.let_go(name)
                holdings.handbacks.clear()
                return
            self.line.log.warning(
                "Worker %s was declared dead (no heartbeat reached Redis in time); %d request(s) dropped, rejoining",
                self.line.worker,
                len(holdings.held),
            )
            for name in list(holdings.held):
                holdings.let_go(name)
            holdings.handbacks.clear()
            self.line.incarnation = uuid.uuid4().hex
        # Whoever was declared dead because Redis is slow is not alone: all would claim in one moment, and read all that
        # they go on from.
        spread = self.line.pace.spread(holdings.settings.heartbeat_timeout)
        self._claims_from = time.monotonic() + random.uniform(0, spread)
        self.rejoined(self.incarnation)

    def _count_refusal(self, error: redis.RedisError) -> None:
        """End the worker when a call that is no single request's is refused or cut off for ever, while others are
        answered.

        Where nothing is sent back and forth any more, requests would stand still without a word.
        """
        if passing(error) or not self.line.answers():
            self._refusals = 0
            return
        self._refusals += 1
        if self._refusals >= REFUSALS:
            raise RuntimeError(f"Redis refused {REFUSALS} calls in a row, and answered others") from error

    def _show(self, *, last: bool = False) -> None:
        """Send the figures of this worker once a heartbeat, and in any case at the end."""
        with self.holdings.lock:
            interval = self.checkpoints.interval()
        self.line.ledger.flush(self.store, self.incarnation, interval, self.checkpoints.usual, last=last)

    def _in_contact(self) -> None:
        self._refusals = 0
        now = time.monotonic()
        if self._outage is not None:
            self.line.log.warning("Redis is back after %.1f s", now - self._outage)
            self._outage = None
        with self.holdings.lock:
            self.holdings.contact = now
            self.holdings.lock.notify_all()

    def _ride_out(self, error: Exception) -> None:
        now = time.monotonic()
        if self._outage is None:
            self._outage = now
            self.line.log.warning("no contact to Redis (%s); requests go on, results wait here", error)
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
                self.checkpoints.hasten()
                self.checkpoints.store()
                while self.checkpoints.uploads.busy and time.monotonic() < deadline:
                    self.checkpoints.store()
                self.endings.end()
                self.endings.confirm_cancels()
                self.endings.release_all("its worker was stopped")
                self._show(last=True)
                return
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    self.line.log.error(
                        "Redis did not answer while stopping (%s); the reaper hands the requests on", error
                    )
                    return
                self._ride_out(error)
