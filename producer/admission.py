"""Admission: requests are sent, and what Redis says of each becomes nothing or one error.

A submit is a generator of pauses: it sends when it is advanced, which blocks, and yields how many seconds to wait
before it is advanced again. Who drives it sleeps as he can: :class:`~perdure.producer.Client` in the calling thread,
:class:`~perdure.producer.AsyncClient` on its loop, so that no thread is kept by what waits for a degraded pool.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from ..protocol.errors import Degraded, DurabilityUnavailable, IdempotencyConflict, RedisUnavailable
from ..protocol.records import NewRequest
from ..protocol.store import Store
from ..protocol.transport.patience import Waiting
from ..protocol.transport.refusals import conflict, key_conflict, queue_full, refusal
from .session import Session
from .submission import chunks

Answer = TypeVar("Answer")
Submission = Generator[float, None, Answer]


def submit_one(session: Session, request: NewRequest, idempotency_key: str | None, *, retry: bool) -> Submission[None]:
    """Store one request. Raises as :meth:`Client.submit` says."""
    operation = partial(Store.enqueue, requests=[request], client=session.client_id)
    waiting = _Waiting(session, retry=retry)
    while True:
        (answer,) = session.call(operation)
        if not answer.startswith("degraded"):
            break
        yield waiting.pause(refusal(answer))
    if answer == "full":
        raise queue_full(request.queue, session.settings.queue_limit)
    if answer == "conflict":
        raise conflict(request.id) if idempotency_key is None else key_conflict(idempotency_key)


def submit_all(session: Session, requests: Sequence[NewRequest], *, retry: bool) -> Submission[None]:
    """Store many requests. Raises as :meth:`Client.submit_many` says."""
    answers = [""] * len(requests)
    left = list(range(len(requests)))
    waiting = _Waiting(session, retry=retry)
    while left:
        _send(session, requests, left, answers)
        left = [index for index, answer in enumerate(answers) if answer.startswith("degraded")]
        if left:
            error = refusal(answers[left[0]], _refused(answers))
            _note(error, requests, answers)
            yield waiting.pause(error)
    if full := _refused(answers):
        error_of_queue = queue_full(requests[full[0]].queue, session.settings.queue_limit, full)
        _note(error_of_queue, requests, answers)
        raise error_of_queue
    taken = _taken(requests, answers)
    if len(taken) == 1:
        raise conflict(taken[0])
    if taken:
        raise IdempotencyConflict(f"the ids {', '.join(taken[:10])} belong to other requests; choose new ones")


def through(submission: Submission[Answer]) -> Answer:
    """Drive a submit to its end in this thread."""
    while True:
        pause, answer = advance(submission)
        if pause is None:
            return answer  # type: ignore[return-value]
        time.sleep(pause)


def advance(submission: Submission[Answer]) -> tuple[float | None, Answer | None]:
    """One step of a submit, which blocks: seconds to wait before the next one, or ``None`` and what it returned."""
    try:
        return next(submission), None
    except StopIteration as end:
        return None, end.value


class _Waiting:
    """How long a submit waits for a degraded pool: for as long as the client is patient, if it is to wait at all."""

    def __init__(self, session: Session, *, retry: bool) -> None:
        self._until = time.monotonic() + (session.patience if retry else 0.0)

    def pause(self, error: Degraded) -> float:
        """Seconds until the next try, never before the pool can be normal; raises ``error`` when it was the last."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise error
        # Spread, so that all that were refused do not come back in one moment.
        return min(left, error.retry_after * random.uniform(1.0, 1.5))


def _send(session: Session, requests: Sequence[NewRequest], left: Sequence[int], answers: list[str]) -> None:
    """Send the requests at these positions, and enter their answers."""
    parts = list(chunks([requests[index] for index in left]))
    places = iter(left)

    def enter(found: Sequence[str]) -> None:
        for answer in found:
            answers[next(places)] = answer

    durable = any(request.durable for request in requests)
    sent = 0
    while sent < len(parts):
        # One at first, which shows that the server answers and has the script; and after each failure.
        try:
            enter(session.call(partial(Store.enqueue, requests=parts[sent], client=session.client_id)))
        except DurabilityUnavailable as error:
            error.add_note(f"{_stored(answers) + len(error.request_ids)} of {len(requests)} requests were stored")
            raise
        except RedisUnavailable as error:
            error.add_note(
                f"{_stored(answers)} of {len(requests)} requests were stored; the next {len(parts[sent])} may have been"
            )
            raise
        sent += 1
        if not durable:
            sent += _send_ahead(session, parts[sent:], enter)


def _send_ahead(session: Session, parts: Sequence[Sequence[NewRequest]], enter: Callable[[Sequence[str]], None]) -> int:
    """Send as many as can be, each while Redis still stores the one before; returns how many were answered.

    With what is left it is as if it had never been sent: sent again, it is stored once.
    """
    answered = 0

    def operation(store: Store) -> None:
        nonlocal answered
        for found in store.enqueue_in_turn(parts, client=session.client_id):
            enter(found)
            answered += 1

    if parts:
        with suppress(Waiting, RedisUnavailable):
            session.attempt(operation)
    return answered


def _stored(answers: Sequence[str]) -> int:
    return sum(answer in ("accepted", "already", "same") for answer in answers)


def _refused(answers: Sequence[str]) -> list[int]:
    """Positions of what may be sent again later."""
    return [index for index, answer in enumerate(answers) if answer == "full" or answer.startswith("degraded")]


def _taken(requests: Sequence[NewRequest], answers: Sequence[str]) -> list[str]:
    return [request.id for request, answer in zip(requests, answers, strict=True) if answer == "conflict"]


def _note(error: Exception, requests: Sequence[NewRequest], answers: Sequence[str]) -> None:
    """Say what became of the others."""
    error.add_note(f"{_stored(answers)} of {len(requests)} requests were stored")
    if (full := answers.count("full")) and isinstance(error, Degraded):
        error.add_note(f"{full} of those that were not came to a full queue")
    if taken := _taken(requests, answers):
        error.add_note(f"these ids belong to other requests: {', '.join(taken[:10])}")
