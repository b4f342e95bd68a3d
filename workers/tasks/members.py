"""Members: the admitted requests of a task that each move by themselves, beside the engine loop.

The loop never waits in a member's code: it lets the idle ones go on, collects the steps that have come,
and hears by its mailbox that there is something to collect. One member that is slow, or hangs, holds no
other up.

A step that runs cannot be ended from outside. A member that is dropped in the middle of one is *leaving*:
what the step brings is ignored, and the member's slot is free again only when it has come back.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ...protocol.telemetry import logs
from .base import BatchTask, Request, Step, Task

log = logging.getLogger("rq.worker")


def _nothing() -> None:
    """What a member is told before it has been started."""


@dataclass(slots=True, eq=False)
class Member:
    """One execution. The same request may be admitted again while an older member of it still leaves."""

    request: Request
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    go: Callable[[], object] = _nothing
    """Has the next step computed, wherever this member runs."""
    stop: Callable[[], object] = _nothing
    """Has the member closed, as soon as no step of it runs."""

    started: bool = False
    """A thread, or the event loop, runs it."""
    limit: float | None = None
    """Seconds that one of its steps may take, if that is not as the task says."""
    computing: bool = False
    since: float = 0.0
    """When its running step began (monotonic seconds)."""
    arrived: bool = False
    """A step of it waits to be collected."""
    withheld: bool = False
    """It must not go on until what it has put out is stored."""
    dropped: bool = False


class Members(BatchTask):
    """Runs the requests of one :class:`Task`; subclasses say where. What one of them raises is that one's alone.

    ``news`` is called, from any thread, when there is something to collect or a slot came free.
    """

    def __init__(self, task: Task, news: Callable[[], None] = _nothing) -> None:
        self.task = task
        self.slots = task.slots
        self.step_timeout = task.step_timeout
        self.reproducible = task.reproducible
        self._news = news
        self._lock = threading.Condition()
        self._members: dict[str, Member] = {}
        self._leaving: set[Member] = set()
        self._arrived: list[tuple[Member, Step]] = []

    # --- for the engine loop -----------------------------------------------------------------------

    @property
    def computing(self) -> frozenset[str]:
        """Ids of the requests whose step runs now."""
        with self._lock:
            return frozenset(name for name, member in self._members.items() if member.computing)

    @property
    def free_slots(self) -> int:
        """Slots less those in which something dropped still runs."""
        with self._lock:
            return max(0, self.slots - len(self._leaving))

    def admit(self, request: Request) -> None:
        member = Member(request)
        member.context.run(logs.enter, request.id, request.execution)
        with self._lock:
            self._members[request.id] = member
        try:
            self._start(member)
        except BaseException:
            del self._members[request.id]
            raise

    def resume(self) -> None:
        """Let all go on whose last step was collected, but those that are withheld. Does not wait."""
        now = time.monotonic()
        with self._lock:
            idle = [item for item in self._members.values() if not (item.computing or item.arrived or item.withheld)]
            for member in idle:
                member.computing, member.since = True, now
        for member in idle:
            member.go()

    def collect(self) -> list[Step]:
        """The steps that have come since the last time, at most one for each request. Does not wait."""
        steps = []
        with self._lock:
            for member, step in self._arrived:
                if member.dropped:
                    continue
                member.arrived = False
                if step.ends:
                    del self._members[member.request.id]
                steps.append(step)
            self._arrived = []
        return steps

    def step(self) -> Iterable[Step]:
        """Let all go on and wait for the first steps: how the batch is run without an engine loop."""
        self.resume()
        with self._lock:
            self._lock.wait_for(lambda: self._arrived or not any(item.computing for item in self._members.values()))
        return self.collect()

    def withhold(self, request_ids: Iterable[str]) -> None:
        """Do not let these go on until :meth:`release`."""
        self._set_withheld(request_ids, True)

    def release(self, request_ids: Iterable[str]) -> None:
        """These may go on again."""
        self._set_withheld(request_ids, False)

    def stepping_for(self, request_id: str) -> float:
        """Seconds that the running step of a request has taken so far; 0 if none runs."""
        with self._lock:
            member = self._members.get(request_id)
            return time.monotonic() - member.since if member is not None and member.computing else 0.0

    def limit(self, request_id: str, seconds: float | None) -> None:
        """How long one step of a request may take; ``None`` is as long as the task says."""
        with self._lock:
            if member := self._members.get(request_id):
                member.limit = seconds

    def stuck(self, step_timeout: float) -> str:
        """Why no step can run any more: each slot is taken by one that takes too long. Empty if one can.

        ``step_timeout``: seconds, for those without a limit of their own. A slot is taken by what was dropped too.
        """
        if self._late(step_timeout) < self.slots:
            return ""
        return f"each of its {self.slots} slots is taken by a step that does not end"

    def drop(self, request_id: str) -> None:
        with self._lock:
            member = self._members.pop(request_id, None)
            if member is None:
                return
            member.dropped = True
            if member.started:
                self._leaving.add(member)
        member.stop()

    def join(self, timeout: float) -> bool:
        """Wait until all that was dropped has left; False if something has not after so many seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._leaving, timeout)

    def close(self) -> None:
        """End the threads that wait for requests; those in a step end after it."""
        raise NotImplementedError

    # --- for the subclass --------------------------------------------------------------------------

    def _start(self, member: Member) -> None:
        """Set ``go`` and ``stop``, and have the member run."""
        raise NotImplementedError

    def _began(self, member: Member) -> bool:
        """A thread takes the member; False if it was dropped while it waited for one."""
        with self._lock:
            member.started = not member.dropped
            return member.started

    def _came(self, member: Member, step: Step) -> bool:
        """A step has ended; False if nobody wants it, or the next one, any more."""
        named = Step(step.output, step.state, member.request.id, step.result, step.error, step.durable)
        with self._lock:
            member.computing = False
            if member.dropped:
                return False
            member.arrived = True
            self._arrived.append((member, named))
            self._lock.notify_all()
        self._news()
        return not step.ends

    def _left(self, member: Member) -> None:
        """Nothing of the member runs any more."""
        with self._lock:
            leaving = member in self._leaving
            self._leaving.discard(member)
            member.started = False
            self._lock.notify_all()
        if leaving:
            self._news()

    def _late(self, step_timeout: float) -> int:
        """How many have been in a step for too long."""
        now = time.monotonic()
        with self._lock:
            return sum(
                item.computing and now - item.since > (item.limit or step_timeout)
                for item in {*self._members.values(), *self._leaving}
            )

    def _set_withheld(self, request_ids: Iterable[str], value: bool) -> None:
        with self._lock:
            for name in request_ids:
                if member := self._members.get(name):
                    member.withheld = value
