"""A handle: what becomes of one request.

A handle is the request's id and a way to ask. The truth stands in Redis; a handle keeps nothing that could
grow old, and a request can have any number of handles in any number of processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, ClassVar, Generic, TypeVar

from ..protocol.errors import PerdureError, UnknownRequest, UsageError
from ..protocol.records import Checkpoint, Details, Event, RequestRecord
from .arguments import DEFAULT, Default, waited, whole
from .reading import questions
from .reading.gathering import Gathering
from .reading.outputs import OutputReader
from .reading.questions import Limit
from .reading.steps import Call, Fetch, Give, Hear, Join, Question, Read, Sleep, Step
from .reading.timeline import attempts_of
from .session import Session

Answer = TypeVar("Answer")
SessionT = TypeVar("SessionT")


class Reference(Generic[SessionT]):
    """What every handle is: an id, bound to a client's session or not."""

    __slots__ = ("_session_or_none", "id")

    _kind: ClassVar[str] = ""
    """Handles of one kind with one id are equal."""

    def __init__(self, id: str, session: SessionT | None) -> None:
        self.id = id
        self._session_or_none = session

    @property
    def _session(self) -> SessionT:
        if self._session_or_none is None:
            raise UsageError(f"this handle was unpickled and knows only its id; use client.get({self.id!r})")
        return self._session_or_none

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and other.id == self.id and self._kind is other._kind

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.id, None)


class Handle(Reference[Session]):
    """One request: ``id``, and questions about it. Made by a client; usable by several threads.

    Equal handles have equal ids. A pickled handle is its id alone; ``client.get(handle.id)`` binds it again.

    Every method that asks raises :class:`UnknownRequest` if there is no such request (any more) and
    :class:`RedisUnavailable` if Redis does not answer for as long as the client's patience, or as the call's
    timeout.
    """

    __slots__ = ()

    # --- questions -------------------------------------------------------------------------------

    def record(self) -> RequestRecord:
        """Everything but payload, outputs and result, as it stands now."""
        return self._ask(questions.fetched(self.id))

    def status(self) -> str:
        """RQ's word: queued, scheduled, started, finished, failed, canceled or stopped."""
        return str(self.record().status)

    def done(self) -> bool:
        """True once it has ended, in whatever way."""
        return self.record().ended

    def attempts(self) -> int:
        """How many attempts were begun. An attempt survives the loss of its worker; only own failures count."""
        return attempts_of(self.record())

    def degraded(self) -> bool:
        """True if it runs, or ran, with the overrides that were given as ``degraded``: the pool had lost workers."""
        return self.record().degraded

    def history(self) -> list[Event]:
        """What happened to it, oldest first."""
        return self._ask(questions.history(self.id))

    def details(self) -> Details:
        """What it was given at its submit (deadline, meta, …), and what it waits for."""
        return self._ask(questions.details(self.id))

    def checkpoint(self) -> Checkpoint | None:
        """Where another worker would go on from now; ``None`` if there is nothing to go on from."""
        return self._ask(questions.checkpoint(self.id))

    def traceback(self) -> str:
        """The traceback, or the stacks, with which it last failed; empty if there is none."""
        return self._ask(questions.traceback(self.id))

    def offset(self) -> int:
        """How many outputs are stored."""
        return self._ask(questions.offset(self.id))

    def outputs(self) -> list[Any]:
        """All outputs so far; does not wait."""
        return self._ask(questions.outputs(self.id))

    # --- waiting ---------------------------------------------------------------------------------

    def result(self, timeout: float | Default | None = DEFAULT) -> Any:
        """Wait for the end and return the result.

        ``timeout`` in seconds; ``None`` waits as long as the request takes, through outages of Redis too. So does the
        default, once Redis has answered, unless ``PERDURE_RESPONSE_TIMEOUT`` sets another one, which counts twice if
        the pool was degraded at the submit. Raises :class:`RequestFailed`, :class:`RequestCanceled`, or
        ``TimeoutError``: the request goes on then. That comes as well 5 s after the request's deadline, if its worker
        has not ended it by then.
        """
        return self._ask(questions.result(self.id, self._limit(timeout), self._session.patience))

    def exception(self, timeout: float | Default | None = DEFAULT) -> PerdureError | None:
        """Wait for the end and return what :meth:`result` would raise; ``None`` if it has finished.

        ``timeout`` and ``TimeoutError`` are those of :meth:`result`.
        """
        return self._ask(questions.exception(self.id, self._limit(timeout)))

    def wait(self, timeout: float | Default | None = DEFAULT) -> bool:
        """Wait for the end, whatever it is; False if it has not come within ``timeout`` (as in :meth:`result`)."""
        try:
            self._ask(questions.ended(self.id, self._limit(timeout)))
        except TimeoutError:
            return False
        return True

    def add_done_callback(self, callback: Callable[[Handle], object]) -> None:
        """Have ``callback(handle)`` called once when the request has ended, or is no longer known.

        A thread of the client calls it, also when it has ended already, and one callback at a time: hand long
        work on. An exception is logged. Callbacks that are due after the client was closed are not called.
        """
        session = self._session
        session.callbacks.add(self.id, lambda: callback(Handle(self.id, session)))

    def stream(
        self, start: int = 0, *, restarts: bool = False, timeout: float | Default | None = DEFAULT
    ) -> Iterator[Any]:
        """Yield each output once and in order, as soon as it is stored, until the request ends.

        Args:
            start: skip as many outputs, which you have already.
            restarts: when the request began again from zero and puts out something else than before, go on with
                the new outputs from the first. If they are equal, they go on where they were in any case.
            timeout: longest time in seconds without a new output; ``None`` and the default as in :meth:`result`. While
                Redis does not answer it stands still, once more for as long; then ``RedisUnavailable`` is raised.

        Raises, after all that was put out, :class:`RequestFailed` or :class:`RequestCanceled`; also
        :class:`OutputsRestarted` and ``TimeoutError``: ``stream(start=…)`` goes on from there.
        """
        reader = OutputReader(self.id, start=whole(start, "start", 0), restarts=restarts)
        return self._steps(questions.stream(reader, self.id, self._limit(timeout), self._session.patience))

    def cancel(self, reason: str = "") -> bool:
        """Cancel it: a waiting request ends now, a running one when its worker next writes (it may finish first).

        Returns False if it had ended otherwise. ``reason`` goes into the history.
        """
        return self._ask(questions.cancel(self.id, reason))

    # --- within ----------------------------------------------------------------------------------

    def _limit(self, timeout: float | Default | None) -> Limit:
        return Limit.of_call(timeout, self._session.settings)

    def _ask(self, question: Question[Answer]) -> Answer:
        steps = self._steps(question)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def _steps(self, question: Question[Answer]) -> Generator[Any, None, Answer]:
        """Go through a question step by step; yields what it gives, returns its answer."""
        with closing(question):
            answer = None
            while True:
                try:
                    step = question.send(answer)
                except StopIteration as end:
                    final: Answer = end.value
                    return final
                if isinstance(step, Give):
                    answer = None
                    yield from step.outputs
                else:
                    answer = self._do(step)

    def _do(self, step: Step) -> Any:
        match step:
            case Fetch(id, deadline, ahead):
                if ahead is None:
                    return self._session.call(lambda store: store.fetch(id), deadline=deadline)
                record, result = self._session.call(lambda store: store.fetch_with_result(id), deadline=deadline)
                ahead[:] = [result]
                return record
            case Hear(id):
                return self._session.replies.hear(id)
            case Call(operation, deadline):
                return self._session.call(operation, deadline=deadline)
            case Join(id, channel, outputs):
                return self._session.replies.watch(id, channel, outputs=outputs)
            case Read(id, place, deadline, check):
                return self._session.call(lambda store: store.output_page(id, place, check=check), deadline=deadline)
            case Sleep(watch, silence, most, ahead):
                return watch.wait(silence, most, ahead)
        raise TypeError(f"no step: {step!r}")


def as_completed(handles: Iterable[Handle], timeout: float | None = None) -> Iterator[Handle]:
    """Yield handles in the order in which their requests end, in whatever way; each once.

    As with ``concurrent.futures``, ``timeout`` is for all of them together, and ``None`` waits for ever; they may
    be of several clients. Raises ``TimeoutError`` (the requests go on), :class:`UnknownRequest` and
    :class:`RedisUnavailable`.
    """
    wanted = list(dict.fromkeys(handles))
    limit = None if timeout is None else waited(timeout, "timeout")
    sessions = {handle.id: handle._session for handle in wanted}
    return _as_completed({handle.id: handle for handle in wanted}, sessions, limit)


def _as_completed(handles: dict[str, Handle], sessions: dict[str, Session], limit: float | None) -> Iterator[Handle]:
    deadline = float("inf") if limit is None else time.monotonic() + limit
    bell = threading.Event()
    gatherings: dict[Session, Gathering] = {}
    left = len(handles)
    try:
        for identifier, session in sessions.items():
            gatherings.setdefault(session, Gathering(session, bell)).add(identifier)
        while True:
            bell.clear()
            for gathering in gatherings.values():
                for identifier, record in gathering.look(deadline):
                    if record is None:
                        raise UnknownRequest(identifier)
                    left -= 1
                    yield handles[identifier]
            if not left:
                return
            now = time.monotonic()
            if now >= deadline:
                raise TimeoutError(f"{left} of {len(handles)} requests have not ended within {limit:g} s; they go on")
            due = min(gathering.due for gathering in gatherings.values() if len(gathering))
            bell.wait(max(0.0, min(due, deadline) - now))
    finally:
        for gathering in gatherings.values():
            gathering.close()
