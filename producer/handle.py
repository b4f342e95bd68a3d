"""A handle: what becomes of one request.

A handle is the request's id and a way to ask. The truth stands in Redis; a handle keeps nothing that could
grow old, and a request can have any number of handles in any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, Final

from ..protocol.errors import (
    DeadlineExceeded,
    PerdureError,
    RequestCanceled,
    RequestFailed,
    UnknownRequest,
    UsageError,
)
from ..protocol.records import Checkpoint, Event, FailureKind, RequestRecord
from ..protocol.states import State
from ..protocol.store import Store
from .arguments import waited, whole
from .outputs import OutputReader
from .replies import Watch
from .session import Session
from .timeline import attempts_of, complete

STREAM_SILENCE: Final = 1.0
RESULT_SILENCE: Final = 5.0
"""Seconds without a hint after which the keys are read anyhow."""

PAGE: Final = 256
"""Entries of the output log that are read at once."""


class Handle:
    """One request: ``id``, and questions about it. Made by a client; usable by several threads.

    Equal handles have equal ids. A pickled handle is its id alone; ``client.get(handle.id)`` binds it again.

    Every method that asks raises :class:`UnknownRequest` if there is no such request (any more) and
    :class:`RedisUnavailable` if Redis does not answer for as long as the client's patience, or as the call's
    timeout.
    """

    __slots__ = ("_session_or_none", "id")

    def __init__(self, id: str, session: Session | None) -> None:
        self.id = id
        self._session_or_none = session

    # --- questions -------------------------------------------------------------------------------

    def record(self) -> RequestRecord:
        """Everything but payload, outputs and result, as it stands now."""
        return self._record(None)

    def status(self) -> str:
        """RQ's word: queued, scheduled, started, finished, failed, canceled or stopped."""
        return str(self.record().status)

    def done(self) -> bool:
        """True once it has ended, in whatever way."""
        return self.record().ended

    def attempts(self) -> int:
        """How many attempts were begun. An attempt survives the loss of its worker; only own failures count."""
        return attempts_of(self.record())

    def history(self) -> list[Event]:
        """What happened to it, oldest first."""
        record = self.record()
        return complete(record, self._session.call(lambda store: store.history(self.id)))

    def checkpoint(self) -> Checkpoint | None:
        """Where another worker would go on from now; ``None`` if there is nothing to go on from."""
        return self._session.call(lambda store: store.checkpoint(self.id))

    def offset(self) -> int:
        """How many outputs are stored."""

        def read(store: Store) -> int:
            last = store.outputs(self.id, entry=-1, limit=1)
            return last[0][1] + len(last[0][2]) if last else 0

        return self._session.call(read)

    def outputs(self) -> list[Any]:
        """All outputs so far; does not wait."""
        reader = OutputReader(self.id, restarts=True)
        reader.notice(self.record().epoch)
        outputs: list[Any] = []
        while True:
            entries = self._session.call(partial(Store.outputs, identifier=self.id, entry=reader.entry, limit=PAGE))
            if not entries:
                return outputs
            outputs += reader.feed(entries)
            if reader.entry == 0:  # it began again while we read, so do we
                reader, outputs = OutputReader(self.id, restarts=True), []

    # --- waiting ---------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end and return the result.

        ``timeout`` in seconds; ``None`` takes ``PERDURE_RESPONSE_TIMEOUT``, ``math.inf`` waits for ever. Raises
        :class:`RequestFailed`, :class:`RequestCanceled`, or ``TimeoutError``: the request goes on then.
        """
        limit = self._limit(timeout)
        deadline = time.monotonic() + limit
        record = self._wait(limit, deadline)
        if error := self._error(record):
            raise error
        try:
            return self._session.call(lambda store: store.result(self.id), deadline=max(deadline, self._patience()))
        except ValueError as error:
            raise PerdureError(f"request {self.id} has finished, but its result cannot be read: {error}") from None

    def exception(self, timeout: float | None = None) -> PerdureError | None:
        """Wait for the end and return what :meth:`result` would raise; ``None`` if it has finished.

        ``timeout`` and ``TimeoutError`` are those of :meth:`result`.
        """
        limit = self._limit(timeout)
        return self._error(self._wait(limit, time.monotonic() + limit))

    def stream(self, start: int = 0, *, restarts: bool = False, timeout: float | None = None) -> Iterator[Any]:
        """Yield each output once and in order, as soon as it is stored, until the request ends.

        Args:
            start: skip as many outputs, which you have already.
            restarts: when the request began again from zero and puts out something else than before, go on with
                the new outputs from the first. If they are equal, they go on where they were in any case.
            timeout: longest time in seconds without a new output; ``None`` and ``math.inf`` as in :meth:`result`.

        Raises, after all that was put out, :class:`RequestFailed` or :class:`RequestCanceled`; also
        :class:`OutputsRestarted` and ``TimeoutError``: ``stream(start=…)`` goes on from there.
        """
        reader = OutputReader(self.id, start=whole(start, "start", 0), restarts=restarts)
        return self._stream(reader, self._limit(timeout))

    def cancel(self, reason: str = "") -> bool:
        """Cancel it: a waiting request ends now, a running one when its worker next writes (it may finish first).

        Returns False if it had ended otherwise. ``reason`` goes into the history.
        """
        line = " ".join(reason.split()) or "canceled by its producer"
        answer = self._session.call(lambda store: store.cancel([(self.id, "")], reason=line))[0]
        if answer == "unknown":
            raise UnknownRequest(self.id)
        return answer in ("canceled", "requested")

    # --- within ----------------------------------------------------------------------------------

    @property
    def _session(self) -> Session:
        if self._session_or_none is None:
            raise UsageError(f"this handle was pickled and knows its id only; use client.get({self.id!r})")
        return self._session_or_none

    def _patience(self) -> float:
        return time.monotonic() + self._session.patience

    def _limit(self, timeout: float | None) -> float:
        return waited(self._session.settings.response_timeout if timeout is None else timeout, "timeout")

    def _record(self, deadline: float | None) -> RequestRecord:
        record = self._session.call(lambda store: store.fetch(self.id), deadline=deadline)
        if record is None:
            raise UnknownRequest(self.id)
        return record

    def _wait(self, limit: float, deadline: float) -> RequestRecord:
        """Wait until it has ended."""
        record = self._record(deadline)
        if record.ended:
            return record
        with self._session.replies.watch(self.id, record.client) as watch:
            while True:
                record = self._record(deadline)
                if record.ended:
                    return record
                if not _sleep(watch, RESULT_SILENCE, deadline):
                    raise TimeoutError(
                        f"request {self.id} has not ended within {limit:g} s: it is {_state(record)}. It goes on; wait "
                        f"again with result(), or look at it with: perdure show {self.id}"
                    )

    def _stream(self, reader: OutputReader, limit: float) -> Generator[Any, None, None]:
        deadline = time.monotonic() + limit
        record = self._record(deadline)
        reader.notice(record.epoch)
        with self._session.replies.watch(self.id, record.client) as watch:
            while True:
                moved = yield from self._drain(reader, limit, deadline)
                if moved:
                    deadline = time.monotonic() + limit
                if not moved or watch.look:
                    watch.look = False
                    record = self._record(deadline)
                    if reader.notice(record.epoch):
                        continue
                    if record.ended:
                        ended = yield from self._close(reader, limit, deadline)
                        if ended:
                            return
                        deadline, watch.look = time.monotonic() + limit, True
                        continue
                if not _sleep(watch, STREAM_SILENCE, deadline):
                    raise TimeoutError(
                        f"request {self.id} has put out nothing new for {limit:g} s: it is {_state(record)}. It goes "
                        f"on; read on with stream(start={reader.count}), or look at it with: perdure show {self.id}"
                    )

    def _drain(self, reader: OutputReader, limit: float, deadline: float) -> Generator[Any, None, bool]:
        """Yield what the log has and the reader has not; returns whether there was anything."""
        moved = False
        while True:
            entry = reader.entry
            page = partial(Store.outputs, identifier=self.id, entry=entry, limit=PAGE)
            entries = self._session.call(page, deadline=deadline)
            for output in reader.feed(entries):
                moved = True
                yield output
            if len(entries) < PAGE and reader.entry == entry + len(entries):
                return moved
            # The caller may have taken its time over them.
            deadline = time.monotonic() + limit

    def _close(self, reader: OutputReader, limit: float, deadline: float) -> Generator[Any, None, bool]:
        """Yield the rest after the end was seen; returns False if it goes on after all. Raises how it ended."""
        # What was written before the end is there now; and a request that was requeued meanwhile has not ended.
        yield from self._drain(reader, limit, deadline)
        record = self._record(max(deadline, self._patience()))
        if not record.ended or reader.notice(record.epoch):
            return False
        if error := self._error(record):
            raise error
        return reader.complete()

    def _error(self, record: RequestRecord) -> PerdureError | None:
        """What its end says, if that is not a result."""
        if record.status is State.FINISHED:
            return None
        if record.status is not State.FAILED:
            return RequestCanceled(self.id, str(record.status))
        history, trace = self._session.call(
            lambda store: (store.history(self.id), "" if record.error_reason else store.traceback(self.id))
        )
        # RQ itself fails a request only where none of our workers had it, and writes no more than a traceback.
        lines = trace.strip().splitlines() or ["no reason was stored"]
        kind = record.error_kind or str(FailureKind.UNKNOWN)
        error = DeadlineExceeded if kind == FailureKind.DEADLINE else RequestFailed
        return error(self.id, kind, record.error_reason or lines[-1], [event.as_dict() for event in history])

    def __repr__(self) -> str:
        return f"<Handle {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, (self.id, None)


def _sleep(watch: Watch, silence: float, deadline: float) -> bool:
    """Wait for a hint; False if the deadline has passed already."""
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    watch.wait(min(silence, left))
    return True


def _state(record: RequestRecord) -> str:
    if record.execution:
        return f"running on {record.worker}"
    if record.status is State.QUEUED:
        return f"waiting in the queue {record.queue} (does a worker serve it?)"
    return f"{record.status} in the queue {record.queue}"
