"""A session: what a client and all of its handles share.

One connection pool, one listener for replies, and one rule for outages: whatever is sent is safe to send
again, so a call that got no answer is repeated, with jittered and growing pauses, until a bound is reached.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import redis

from ..protocol.connection import connect, explain, resolve_url
from ..protocol.errors import RedisUnavailable, TryAgainLater, UsageError
from ..protocol.settings import Settings
from ..protocol.store import Store
from .gathering import Callbacks
from .replies import Replies

Answer = TypeVar("Answer")

PATIENCE: Final = 15.0
"""Seconds that a call outlasts an outage of Redis by default."""

PAUSE_BASE: Final = 0.05
PAUSE_CAP: Final = 1.0
"""Seconds between two tries: a random part of a pause that doubles from base to cap."""

LANES: Final = 8
"""Calls in flight at once. A thousand threads that wait share as many connections."""

LANE_WAIT: Final = 60.0
"""Seconds; a call is a millisecond, or a timeout when Redis is away."""

TRANSIENT: Final = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError)
"""What a call that may be sent again can end with."""

CLOSED: Final = "this Client is closed; make a new one"

_FINAL = (redis.AuthenticationError, redis.exceptions.NoPermissionError)


class Session:
    """Used by any number of threads at once."""

    def __init__(
        self, url: str | None, settings: Settings | None, connection: redis.Redis | None, patience: float
    ) -> None:
        self.settings = Settings.from_environment() if settings is None else settings
        self.patience = patience
        self.client_id = os.urandom(8).hex()
        self._owned = connection is None
        if connection is None:
            self._url = url or resolve_url(self.settings)
            connection = connect(self._url, name="perdure-client", check=False)
        elif url is not None:
            raise UsageError("give Client either a url or a connection, not both")
        else:
            self._url = _url_of(connection)
            if connection.get_encoder().decode_responses:
                raise UsageError("Client needs a connection whose replies are bytes: make it without decode_responses")
        self._connection = connection
        # Each call takes a connection of its own from the pool, and a store keeps nothing between two calls.
        self._store = Store(connection, self.settings)
        self.replies = Replies(connection, self.client_id)
        self.callbacks = Callbacks(self)
        self._lanes = threading.BoundedSemaphore(LANES)
        self._closed = False

    def call(self, operation: Callable[[Store], Answer], *, deadline: float | None = None) -> Answer:
        """Run ``operation``, again while Redis does not answer, until ``deadline`` (monotonic; default: patience).

        Raises :class:`RedisUnavailable` at the deadline, and at once when the server refuses this user. One
        call may outlast the deadline by the connection's timeout.
        """
        if deadline is None:
            deadline = time.monotonic() + self.patience
        tries = 0
        while True:
            try:
                return self.attempt(operation, wait=deadline - time.monotonic())
            except TRANSIENT as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self.unavailable(error) from None
                time.sleep(min(left, pause(tries)))
            tries += 1

    def attempt(self, operation: Callable[[Store], Answer], *, wait: float = LANE_WAIT) -> Answer:
        """Run ``operation`` once. Raises one of :data:`TRANSIENT` if it may be run again.

        ``wait``: seconds for one of the :data:`LANES`, within bounds.
        """
        if self._closed:
            raise UsageError(CLOSED)
        try:
            if not self._lanes.acquire(timeout=min(max(wait, PAUSE_CAP), LANE_WAIT)):
                raise redis.TimeoutError("all connections wait for answers")
            try:
                return operation(self._store)
            except Exception:
                if self._closed:
                    # close() took the connection away in the middle of the call: redis-py may raise nearly anything.
                    raise UsageError(CLOSED) from None
                raise
            finally:
                self._lanes.release()
        except _FINAL as error:
            raise self.unavailable(error) from None
        except redis.exceptions.OutOfMemoryError:
            raise TryAgainLater(
                "Redis is at its maxmemory and takes no new requests; free some memory or raise the limit",
                retry_after=1.0,
            ) from None

    def ping(self) -> None:
        """Raise :class:`RedisUnavailable` unless Redis answers now, and ``ProtocolMismatch`` if it speaks a newer protocol.

        Nothing is tried twice.
        """
        try:
            self._store.check_protocol()
        except redis.RedisError as error:
            raise self.unavailable(error) from None

    def close(self) -> None:
        """End the listener and the connections. What waits raises :class:`UsageError`. Harmless when repeated."""
        self._closed = True
        self.callbacks.close()
        self.replies.close()
        if self._owned:
            self._connection.close()

    def unavailable(self, error: Exception) -> RedisUnavailable:
        """What to tell the user about this error of redis-py."""
        # Raised "from None" by the callers: the original error's text may hold the password.
        return explain(error, self._url)


def pause(tries: int) -> float:
    """Seconds before the next try, after ``tries`` + 1 failed ones. Random, so that many clients spread."""
    return random.uniform(0, min(PAUSE_CAP, PAUSE_BASE * 2 ** min(tries, 16)))


def _url_of(connection: redis.Redis) -> str:
    """Where a given connection leads, for messages; without its password."""
    known = connection.connection_pool.connection_kwargs
    if known.get("path"):
        return f"unix://{known['path']}?db={known.get('db') or 0}"
    return f"redis://{known.get('host', 'localhost')}:{known.get('port', 6379)}/{known.get('db') or 0}"
