"""What a handle asks, in which order, and what it makes of the answers.

Each question is a generator of :mod:`.steps`, and returns the answer. A step that fails ends the question with its
error; no question handles one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ...protocol.errors import DeadlineExceeded, PerdureError, RequestCanceled, RequestFailed, UnknownRequest
from ...protocol.reading.output_log import LogPage
from ...protocol.records import Checkpoint, Details, Event, FailureKind, RequestRecord
from ...protocol.settings import Settings
from ...protocol.states import State
from ...protocol.store import Store
from ..arguments import DEFAULT, Default, waited
from .lateness import Overdue, not_yet
from .outputs import OutputReader
from .steps import Call, Fetch, Give, Hear, Join, Question, Read, Sleep
from .timeline import complete
from .watches import ReplyWatch

STREAM_SILENCE: Final = 1.0
RESULT_SILENCE: Final = 5.0
"""Seconds without a hint after which the keys are read anyhow."""


@dataclass(frozen=True, slots=True)
class Limit:
    """How long is waited, in seconds; ``default``: the caller has not said so.

    Then it is twice as long for a request that was submitted to a degraded pool.
    """

    seconds: float
    default: bool = False

    @classmethod
    def of_call(cls, timeout: float | Default | None, settings: Settings) -> Limit:
        """The limit for a method's ``timeout``. Raises :class:`InvalidRequest` for what is no time."""
        if timeout is DEFAULT:
            return cls(settings.response_timeout or math.inf, default=True)
        return cls(math.inf if timeout is None else waited(timeout, "timeout"))

    def contact(self, began: float) -> float | None:
        """Until when Redis must have answered once (monotonic); ``None``: as long as the client is patient.

        Who waits for ever without having said so is to hear of an address at which nobody is.
        """
        return None if self.default and self.seconds == math.inf else began + self.seconds

    def of(self, record: RequestRecord) -> float:
        return 2 * self.seconds if self.default and record.stretched else self.seconds


Ahead = list[Callable[[], Any]]


def fetched(identifier: str, deadline: float | None = None, ahead: Ahead | None = None) -> Question[RequestRecord]:
    record: RequestRecord | None = yield Fetch(identifier, deadline, ahead)
    if record is None:
        raise UnknownRequest(identifier)
    return record


def history(identifier: str) -> Question[list[Event]]:
    record = yield from fetched(identifier)
    return complete(record, (yield Call(lambda store: store.history(identifier))))


def details(identifier: str) -> Question[Details]:
    record = yield from fetched(identifier)
    found: Details = yield Call(lambda store: store.details(identifier, record.queue))
    return found


def checkpoint(identifier: str) -> Question[Checkpoint | None]:
    found: Checkpoint | None = yield Call(lambda store: store.checkpoint(identifier))
    return found


def traceback(identifier: str) -> Question[str]:
    yield from fetched(identifier)

    def read(store: Store) -> str:
        try:
            return store.traceback(identifier)
        except ValueError:
            return ""  # nobody of ours wrote it

    found: str = yield Call(read)
    return found


def offset(identifier: str) -> Question[int]:
    last = yield Call(lambda store: store.outputs(identifier, entry=-1, limit=1))
    return last[0][1] + len(last[0][2]) if last else 0


def outputs(identifier: str) -> Question[list[Any]]:
    reader = OutputReader(identifier, restarts=True)
    reader.notice((yield from fetched(identifier)).epoch)
    found: list[Any] = []
    while True:
        place = reader.place
        page: LogPage = yield Read(identifier, place, None)
        found += reader.take(page)
        if reader.entry < place.entry or page.lost:  # it began again while we read, so do we
            reader, found = OutputReader(identifier, restarts=True), []
        elif not page.more and reader.place == page.next:
            return found


def cancel(identifier: str, reason: str) -> Question[bool]:
    line = " ".join(reason.split()) or "canceled by its producer"
    (answer,) = yield Call(lambda store: store.cancel([(identifier, "")], reason=line))
    if answer == "unknown":
        raise UnknownRequest(identifier)
    return answer in ("canceled", "requested")


def ended(identifier: str, limit: Limit, ahead: Ahead | None = None) -> Question[RequestRecord]:
    """Wait until it has ended. Raises ``TimeoutError`` after ``limit``. ``ahead`` as in :class:`Fetch`."""
    began = time.monotonic()
    # Who listens for its own requests already need not ask first whom to listen to.
    own: ReplyWatch | None = yield Hear(identifier)
    with own or nullcontext():
        if own is not None:
            own.look = False
        record = yield from fetched(identifier, limit.contact(began), ahead)
        if record.ended:
            return record
        seconds = limit.of(record)
        if own is not None and own.channel == record.client:
            return (yield from _end_of(record, own, began + seconds, seconds, ahead))
    watch: ReplyWatch = yield Join(identifier, record.client)
    with watch:
        watch.look = True
        return (yield from _end_of(record, watch, began + seconds, seconds, ahead))


def _end_of(
    record: RequestRecord, watch: ReplyWatch, deadline: float, seconds: float, ahead: Ahead | None
) -> Question[RequestRecord]:
    """Wait for hints of an end and look; of new outputs nothing is asked."""
    overdue = Overdue()
    while True:
        yield from overdue.look(record, deadline)
        while not watch.look:
            if (left := deadline - time.monotonic()) <= 0:
                hint = "wait again with result(timeout=SECONDS) (None: as long as it takes)"
                raise (yield from not_yet(record, f"has not ended within {seconds:g} s", hint))
            yield Sleep(watch, RESULT_SILENCE, min(overdue.within, left))
        watch.look = False
        record = yield from fetched(record.id, deadline, ahead)
        if record.ended:
            return record


def error(record: RequestRecord) -> Question[PerdureError | None]:
    """What its end says, if that is not a result."""
    if record.status is State.FINISHED:
        return None
    if record.status is not State.FAILED:
        return RequestCanceled(record.id, str(record.status))

    def read(store: Store) -> tuple[list[Event], str]:
        return store.history(record.id), "" if record.error_reason else store.traceback(record.id)

    events, trace = yield Call(read)
    # RQ itself fails a request only where none of our workers had it, and writes no more than a traceback.
    lines = trace.strip().splitlines() or ["no reason was stored"]
    kind = record.error_kind or str(FailureKind.UNKNOWN)
    raised = DeadlineExceeded if kind == FailureKind.DEADLINE else RequestFailed
    return raised(record.id, kind, record.error_reason or lines[-1], [event.as_dict() for event in events])


def exception(identifier: str, limit: Limit) -> Question[PerdureError | None]:
    return (yield from error((yield from ended(identifier, limit))))


def result(identifier: str, limit: Limit, patience: float) -> Question[Any]:
    """``patience``: seconds that are left for reading the result even when it came in the last moment."""
    deadline = time.monotonic() + limit.seconds
    ahead: Ahead = []
    record = yield from ended(identifier, limit, ahead)
    if problem := (yield from error(record)):
        raise problem

    def read(result: Callable[[], Any]) -> Any:
        try:
            return result()
        except ValueError as reason:
            raise PerdureError(f"request {identifier} has finished, but its result cannot be read: {reason}") from None

    if ahead:
        return read(ahead[-1])
    later = max(deadline, time.monotonic() + patience)
    return (yield Call(lambda store: read(partial(store.result, identifier)), later))


def stream(reader: OutputReader, identifier: str, silence: Limit, patience: float) -> Question[None]:
    """Give each output once, until it ends. ``silence``: how long without a new one; ``patience`` as in :func:`result`.

    While Redis does not answer nothing new can come: that time does not count, up to once more as long.
    """
    began = time.monotonic()
    record = yield from fetched(identifier, silence.contact(began))
    limit = silence.of(record)
    deadline = began + limit
    reader.notice(record.epoch)
    overdue = Overdue()
    told = False
    ahead: LogPage | None = None
    watch: ReplyWatch = yield Join(identifier, record.client, outputs=True)
    with watch:
        while True:
            asked = time.monotonic()
            moved = yield from _drain(reader, identifier, limit, deadline + limit, ahead)
            ahead = None
            deadline = time.monotonic() + limit if moved else deadline + _away(asked)
            if not moved or watch.look:
                watch.look = False
                asked, listens = time.monotonic(), watch.listens
                record = yield from fetched(identifier, deadline + limit)
                deadline += _away(asked)
                if listens and not told:
                    told = True  # who claims it after this look sees by himself that somebody listens
                    if record.execution:
                        yield Call(partial(Store.listen, worker=record.worker, identifier=identifier), deadline + limit)
                if reader.notice(record.epoch) or reader.compare(record.epoch):
                    continue
                if record.ended:
                    if (yield from _close(reader, identifier, limit, deadline, patience)):
                        return
                    deadline, watch.look = time.monotonic() + limit, True
                    continue
                yield from overdue.look(record, deadline + limit)
            if (left := deadline - time.monotonic()) <= 0:
                hint = f"read on with stream(start={reader.count}, timeout=SECONDS)"
                raise (yield from not_yet(record, f"has had no new output for {limit:g} s", hint))
            ahead = yield Sleep(watch, STREAM_SILENCE, min(overdue.within, left), reader.place, deadline + limit)


def _away(asked: float) -> float:
    """Seconds for which Redis must have been away, if an answer to what was ``asked`` (monotonic) took so long."""
    took = time.monotonic() - asked
    return took if took > STREAM_SILENCE else 0.0


def _drain(
    reader: OutputReader,
    identifier: str,
    limit: float,
    deadline: float,
    page: LogPage | None = None,
    *,
    check: bool = False,
) -> Question[bool]:
    """Give what the log has and the reader has not; returns whether there was anything.

    ``page``: what was read already; ``check`` as for :class:`Read`.
    """
    moved = False
    while True:
        if page is None:
            page = yield Read(identifier, reader.place, deadline, check)
        if fresh := reader.take(page):
            moved = True
            yield Give(fresh)
        if not page.more and reader.place == page.next:
            return moved
        # The caller may have taken its time over them.
        page, deadline = None, time.monotonic() + limit


def _close(reader: OutputReader, identifier: str, limit: float, deadline: float, patience: float) -> Question[bool]:
    """Give the rest after the end was seen; returns False if it goes on after all. Raises how it ended."""
    # What was written before the end is there now; and a request that was requeued meanwhile has not ended.
    yield from _drain(reader, identifier, limit, deadline, check=True)
    record = yield from fetched(identifier, max(deadline, time.monotonic() + patience))
    if not record.ended or reader.notice(record.epoch) or reader.compare(record.epoch):
        return False
    if problem := (yield from error(record)):
        raise problem
    return reader.complete()
