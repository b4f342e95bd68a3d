"""Waiting for Redis: pauses between two tries, and who waits for refusals that pass (:mod:`.refusals`)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..settings import redact
from .explaining import explain
from .refusals import PASSING, code_of

Answer = TypeVar("Answer")

PAUSE_BASE: Final = 0.05
PAUSE_CAP: Final = 1.0
"""Seconds between two tries: a random part of a pause that doubles from base to cap."""


class Waiting(Exception):
    """The same call may be taken in a moment: Redis does not answer, or refuses for a reason that passes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error
        """What redis-py raised."""


def pause(tries: int) -> float:
    """Seconds before the next try, after ``tries`` + 1 failed ones. Random, so that many clients spread."""
    return random.uniform(0, min(PAUSE_CAP, PAUSE_BASE * 2 ** min(tries, 16)))


def when_it_may(call: Callable[[], Answer], url: str, say: Callable[[str], object]) -> Answer:
    """What ``call`` returns once Redis takes it: for the start of a process. Waits while the server answers and refuses
    for a reason that passes, and ``say``s so once.

    Raises :class:`RedisUnavailable` at once if there is no answer, or the user is refused.
    """
    tries = 0
    while True:
        try:
            return call()
        except redis.RedisError as error:
            if code_of(error) not in PASSING:
                raise explain(error, url) from None
            if not tries:
                say(f"Redis at {redact(url)} takes no calls now: {PASSING[code_of(error)]}. Waiting for it.")
        time.sleep(pause(tries))
        tries += 1


class Patient(Retry):
    """For a connection that code of RQ's uses, which waits for nothing: a refusal that passes is waited for, however
    long.

    The server has not done what it refused, so it may be asked again; over another connection, since its address may
    lead to another primary by now. Errors of the connection itself are left to what was set for it.
    """

    def call_with_retry(self, do: Any, fail: Any, *args: Any, **kwargs: Any) -> Any:
        tries = 0
        while True:
            try:
                return super().call_with_retry(do, fail, *args, **kwargs)
            except redis.RedisError as error:
                if code_of(error) not in PASSING:
                    raise
                tries += 1
                fail(error, tries) if kwargs.get("with_failure_count") else fail(error)
            time.sleep(pause(tries))


def be_patient(connection: redis.Redis) -> None:
    """Have whoever uses this connection wait for refusals that pass."""
    known: Any = connection.get_retry()
    retries = known.get_retries() if known is not None else 0
    connection.connection_pool.set_retry(Patient(NoBackoff() if known is None else known._backoff, retries))
