"""A batch on its way: reads lines, keeps the pool busy, writes down what ends, and rides out what fails around it."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, Final, Protocol

import redis

from ...producer.reading.gathering import Gathering
from ...producer.session import Session
from ...producer.submission import chunks
from ...protocol.codec import unpack_exception, unpack_result
from ...protocol.errors import PerdureError, RedisUnavailable, TryAgainLater, UsageError
from ...protocol.keys import key, served, with_priority
from ...protocol.records import NewRequest, RequestRecord
from ...protocol.states import State
from ...protocol.store import Store
from . import bodies
from .ledger import Ledger, entry
from .lines import Checked, Source, made, parse, stripped
from .tally import Tally
from .window import Ticket, Window

SLICE: Final = 1.0
"""Seconds that a call may take before the progress is shown and the outage counted; also the longest wait."""

PAUSE: Final = 0.2
"""Seconds between two tries while Redis does not serve."""

ALONE: Final = 10.0
"""Seconds without an end after which it is looked whether any worker serves the queue."""

PAGE: Final = 32
"""Results that are read at once: each may have several MiB."""


class Watcher(Protocol):
    """Who watches. Called often; draws as often as it likes."""

    def show(self, tally: Tally) -> None: ...

    def say(self, line: str) -> None:
        """Something that a person should know of."""


class BatchRun:
    """One run over a checked file.

    :meth:`go` returns when every line is on disk in one of the two files. It can be ended at any moment, by anything:
    what is on disk is done, what runs is found again by the ids of its requests, and the rest has not begun.
    """

    def __init__(
        self,
        session: Session,
        source: Source,
        checked: Checked,
        ledger: Ledger,
        progress: Watcher,
        *,
        in_flight: int,
        patience: float,
        options: dict[str, Any],
    ) -> None:
        """``patience``: seconds that one outage of Redis is waited out. ``options`` are those of a submit."""
        done, kept, failed = ledger.resume(checked)
        checked.places.clear()  # from here on, a line is its number
        self.tally = Tally(checked.count, kept=kept, failed_before=failed)
        self._session = session
        self._source = source
        self._checked = checked
        self._ledger = ledger
        self._progress = progress
        self._patience = patience
        self._options = options
        self._window = Window(in_flight)
        self._bell = threading.Event()
        self._gathering = Gathering(session, self._bell)
        self._ended: deque[tuple[str, RequestRecord | None]] = deque()
        self._refused = [number for number in checked.bad if not done[number]]
        self._unread: Iterator[Ticket] | None = self._tickets(done)
        self._away_since: float | None = None
        self._queue = with_priority(options.get("queue", "default"), options.get("priority", "normal"))
        self._moved = (0, time.monotonic())

    def go(self) -> Tally:
        """Run to the end.

        Raises :class:`RedisUnavailable` when an outage outlasts the patience, and :class:`PerdureError` when the files
        cannot be written or the input has changed under way.
        """
        self._refuse()
        try:
            while self._unread is not None or len(self._window):
                self._bell.clear()
                try:
                    self._fill()
                    self._submit()
                    self._collect()
                    self._check_served()
                except RedisUnavailable as error:
                    self._away(error)
                except redis.RedisError as error:  # refused, as while its disk is full: an outage like any other
                    self._away(self._session.unavailable(error))
                except TryAgainLater as refusal:
                    self._window.waiting_for = "memory"
                    self._window.pause(time.monotonic(), refusal.retry_after)
                else:
                    self._back()
                self._look()
                self._wait()
        finally:
            with suppress(redis.RedisError, OSError):
                self._gathering.close()
        return self.tally

    def _refuse(self) -> None:
        """Write down the lines that cannot be run, each once."""
        if self._refused:
            number = len(self._refused)
            self._progress.say(
                f"{number} bad {'line' if number == 1 else 'lines'} in {self._checked.name}; the others are run."
            )
        for start in range(0, len(self._refused), PAGE):
            page = self._refused[start : start + PAGE]
            rows = [(self._checked.bad_id(number), self._checked.bad[number]) for number in page]
            self._ledger.append(
                [],
                [
                    entry(it, bad.custom_id or None, *bodies.refusal(it, "INVALID_REQUEST", bad.reason))
                    for it, bad in rows
                ],
            )
            self.tally.failed += len(page)

    # --- in ----------------------------------------------------------------------------------------------

    def _tickets(self, done: bytearray) -> Iterator[Ticket]:
        """The lines that are not on disk yet, read once more."""
        number = 0
        for number, (offset, raw) in enumerate(self._source.raw(), 1):
            if number > len(self._checked.sums) or zlib.crc32(raw) != self._checked.sums[number - 1]:
                raise self._changed()
            if not done[number] and number not in self._checked.bad and stripped(raw, offset):
                yield self._ticket(raw, number, offset)
        if number != len(self._checked.sums):
            raise self._changed()

    def _ticket(self, raw: bytes, number: int, offset: int) -> Ticket:
        line = parse(stripped(raw, offset), number, offset)
        request = made(line, self._checked.identity, self._session.settings, self._options)
        return Ticket(number, offset, line.custom_id, line.url, line.model, request, request.id)

    def _changed(self) -> PerdureError:
        return UsageError(
            f"{self._checked.name} was changed while it was being run; what was answered is kept. "
            "Put it back as it was and run again, or run it with another -o and -e"
        )

    def _fill(self) -> None:
        while self._unread is not None and self._window.room > 0:
            ticket = next(self._unread, None)
            if ticket is None:
                self._unread = None
                return
            self._window.take(ticket)

    def _submit(self) -> None:
        while due := self._window.due(time.monotonic()):
            requests = [ticket.request for ticket in due if ticket.request is not None]
            chunk: list[NewRequest] = next(chunks(requests))
            client_id = self._session.client_id
            answers = self._call(partial(Store.enqueue, requests=chunk, client=client_id))
            self.tally.found += answers.count("same")
            taken = self._window.answered(list(zip(due, answers, strict=False)), time.monotonic())
            for ticket in due[: len(answers)]:
                if ticket.id in self._window.running:
                    self._gathering.add(ticket.id)
            self._write_failures([(ticket, "ID_TAKEN", _TAKEN.format(ticket.id)) for ticket in taken])

    # --- out ---------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        # What the gathering gives, it gives once: it is kept here until it is on disk, through any outage.
        self._settle_all()
        for pair in self._gathering.look(time.monotonic() + SLICE):
            self._ended.append(pair)
        self._settle_all()

    def _settle_all(self) -> None:
        while self._ended:
            self._settle(list(islice(self._ended, PAGE)))

    def _settle(self, page: list[tuple[str, RequestRecord | None]]) -> None:
        """Write down what has ended; one call of fsync for each file and page."""
        ended = [(self._window.running[identifier], record) for identifier, record in page]
        values = self._call(partial(_read_ends, identifiers=[identifier for identifier, _ in page]))
        answers: list[tuple[Ticket, Any]] = []
        failures: list[tuple[Ticket, str, str]] = []
        lost: list[Ticket] = []
        for (ticket, record), fields in zip(ended, values, strict=True):
            if record is None or (record.status is State.FINISHED and not fields):
                lost.append(ticket)  # with its data, or because its time was over
            elif record.status is not State.FINISHED:
                failures.append((ticket, *_failure(record, fields)))
            else:
                try:
                    result = unpack_result(fields[b"return_value"]) if b"return_value" in fields else None
                    answers.append(
                        (ticket, bodies.answer(ticket.url, ticket.id, ticket.model, _created(record), result))
                    )
                except ValueError as error:
                    failures.append((ticket, "UNREADABLE", f"its result cannot be read: {error}"))
        for ticket in lost:
            raw = self._source.at(ticket.offset)
            if zlib.crc32(raw) != self._checked.sums[ticket.number - 1]:
                raise self._changed()
            again = self._ticket(raw, ticket.number, ticket.offset)
            if not self._window.lost(ticket.id, again.request):
                failures.append((ticket, "LOST", f"request {ticket.id} has vanished from Redis {ticket.losses} times"))
        if lost:
            self._progress.say(
                f"{len(lost)} requests that were under way are not in Redis any more; they are submitted again."
            )
        self._write(answers, failures)
        for ticket, record in ended:
            if record is not None:
                self.tally.resumes += max(0, record.executions - 1)
            if ticket not in lost or ticket.id in self._window.running:
                self._window.ended(ticket.id)
            self._ended.popleft()

    def _write(self, answers: list[tuple[Ticket, Any]], failures: list[tuple[Ticket, str, str]]) -> None:
        lines = [
            entry(ticket.id, ticket.custom_id, {"status_code": 200, "request_id": ticket.id, "body": body}, None)
            for ticket, body in answers
        ]
        refused = [
            entry(ticket.id, ticket.custom_id, *bodies.refusal(ticket.id, code, text))
            for ticket, code, text in failures
        ]
        self._ledger.append(lines, refused)
        self.tally.answered += len(lines)
        self.tally.failed += len(refused)
        for _, body in answers:
            usage = body.get("usage") if isinstance(body, dict) else None
            if isinstance(usage, dict):
                self.tally.prompt_tokens += _number(usage.get("prompt_tokens"))
                self.tally.tokens += _number(usage.get("completion_tokens"))

    def _write_failures(self, failures: list[tuple[Ticket, str, str]]) -> None:
        if failures:
            self._write([], failures)

    # --- around ------------------------------------------------------------------------------------------

    def _call(self, operation: Callable[[Store], Any]) -> Any:
        return self._session.call(operation, deadline=time.monotonic() + SLICE)

    def _away(self, error: RedisUnavailable) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now - SLICE
            self._progress.say(f"{error} Waiting for it, up to {self._patience:g} s.")
        if now - self._away_since > self._patience:
            error.add_note(f"waited for {self._patience:g} s; the same command goes on from here")
            raise error from None

    def _back(self) -> None:
        if self._away_since is not None:
            self._progress.say(f"Redis answers again, after {time.monotonic() - self._away_since:.0f} s.")
            self._away_since = None

    def _check_served(self) -> None:
        """Say once that nobody works on the queue, if nothing has ended for a while."""
        count, since = self._moved
        if self.tally.ended != count:
            self._moved = (self.tally.ended, time.monotonic())
        elif time.monotonic() - since > ALONE:
            self._moved = (count, math.inf)
            workers = self._call(Store.workers)
            if not any(self._queue in queues for worker in workers for queues in map(served, worker["queues"])):
                self._progress.say(
                    f"no worker serves the queue {self._queue}; it goes on when there is one. "
                    f"Start it with: rq worker -w perdure.workers.Worker {self._queue}"
                )

    def _look(self) -> None:
        self.tally.in_flight = len(self._window.running)
        self.tally.waiting_for = "redis" if self._away_since is not None else self._window.waiting_for
        self.tally.sample(time.monotonic())
        self._progress.show(self.tally)

    def _wait(self) -> None:
        if self._unread is None and not len(self._window):
            return
        if self._away_since is not None:
            time.sleep(PAUSE)  # a refusal comes at once
            return
        now = time.monotonic()
        seconds = min(SLICE, max(0.0, self._gathering.due - now))
        due = self._window.next(now)
        self._bell.wait(seconds if due is None else min(seconds, due))


_TAKEN: Final = "another request has the id {} that belongs to this line: it was submitted by somebody else"


def _read_ends(store: Store, identifiers: list[str]) -> list[dict[bytes, bytes]]:
    """The last entry of each request's results, in one round trip; nothing where there is none."""
    with store.connection.pipeline(transaction=False) as pipe:
        for identifier in identifiers:
            pipe.xrevrange(key("results", identifier), count=1)
        replies: list[list[tuple[bytes, dict[bytes, bytes]]]] = pipe.execute()
    return [entries[0][1] if entries else {} for entries in replies]


def _failure(record: RequestRecord, fields: dict[bytes, bytes]) -> tuple[str, str]:
    """Kind and reason of an end that is no result."""
    if record.status is not State.FAILED:
        return str(record.status).upper(), f"request {record.id} was {record.status}"
    reason = record.error_reason
    if not reason and b"exc_string" in fields:
        # RQ itself has failed it, and writes no more than a traceback.
        with suppress(ValueError):
            reason = (unpack_exception(fields[b"exc_string"]).strip().splitlines() or [""])[-1]
    return record.error_kind or "UNKNOWN", reason or "no reason was stored"


def _created(record: RequestRecord) -> int:
    """When its request was made, in seconds since 1970; 0 if that is not to be read."""
    try:
        return int(datetime.fromisoformat(record.created_at).timestamp())
    except ValueError:
        return 0


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
