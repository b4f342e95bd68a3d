"""A session: what a client and all of its handles share.

One connection pool, one listener for replies, and one rule for outages: whatever is sent is safe to send
again, so a call that got no answer is repeated, with jittered and growing pauses, until a bound is reached.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import redis

from ..protocol.connection import connect, resolve_url
from ..protocol.errors import PerdureError, RedisUnavailable, TryAgainLater, UsageError
from ..protocol.reading.output_log import LogPage, LogPlace
from ..protocol.settings import Settings
from ..protocol.store import Store
from ..protocol.transport.explaining import explain, url_of
from ..protocol.transport.patience import PAUSE_CAP, Waiting, pause
from ..protocol.transport.refusals import memory_full, waited_for
from .lanes import Lanes, Owner, separate
from .reading.gathering import Callbacks
from .reading.replies import Replies

Answer = TypeVar("Answer")

PATIENCE: Final = 15.0
"""Seconds that a call outlasts an outage of Redis by default."""

LANE_WAIT: Final = 60.0
"""Seconds; a call is a millisecond, or a timeout when Redis is away."""

CLOSED: Final = "this Client is closed; make a new one"


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
            self._url = url_of(connection)
            if connection.get_encoder().decode_responses:
                raise UsageError("Client needs a connection whose replies are bytes: make it without decode_responses")
        self._connection = connection
        self._closed = False
        self._lanes = Lanes(connection, self.settings)
        self.replies = Replies(lambda: separate(connection), self.client_id, self._publish, self._look)
        self.callbacks = Callbacks(self)
        self.children: list[weakref.WeakMethod[Callable[[], None]]] = []
        """What else is to begin anew in a child that was forked."""
        _sessions.add(self)

    def forked(self) -> None:
        """In a forked child: begin anew. The parent's threads are not here, and their locks may be held for ever."""
        self._lanes = Lanes(self._connection, self.settings)
        self.replies.reset()
        self.callbacks.reset()
        for reference in self.children:
            if reset := reference():
                reset()

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
            except Waiting as waiting:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self.unavailable(waiting.error) from None
            time.sleep(min(left, pause(tries)))
            tries += 1

    def attempt(self, operation: Callable[[Store], Answer], *, wait: float = LANE_WAIT) -> Answer:
        """Run ``operation`` once. Raises :class:`Waiting` if it may be run again, and nothing of redis-py's.

        ``wait``: seconds for one of the lanes, within bounds.
        """
        if self._closed:
            raise UsageError(CLOSED)
        return self._attempt(operation, wait)

    def _attempt(self, operation: Callable[[Store], Answer], wait: float) -> Answer:
        lanes, owner = self._lanes, Owner()
        try:
            lane = lanes.take(owner, min(max(wait, PAUSE_CAP), LANE_WAIT))
            if lane is None or lane.store is None:
                raise redis.TimeoutError("all connections wait for answers")
            try:
                answer = operation(lane.store)
            except redis.ResponseError:
                lane.clean = True  # an answer like any other
                raise
            lane.clean = True
            return answer
        except Exception as error:
            if self._closed:
                # close() took the connection away in the middle of the call: redis-py may raise nearly anything.
                raise UsageError(CLOSED) from None
            if waited_for(error):
                if isinstance(error, redis.ResponseError):  # the address may lead to another primary by now
                    lanes.renew()
                    self.replies.renew()
                raise Waiting(error) from None
            if memory_full(error):
                raise TryAgainLater(
                    "Redis is at its maxmemory and takes no new requests; free some memory or raise the limit",
                    retry_after=1.0,
                ) from None
            if isinstance(error, redis.RedisError):
                raise self.unavailable(error) from None
            raise
        finally:
            lanes.give_back(owner)

    def ping(self) -> None:
        """Raise :class:`RedisUnavailable` unless Redis answers now, and ``ProtocolMismatch`` if it speaks a newer
        protocol.

        Nothing is tried twice.
        """
        try:
            self.attempt(Store.check_protocol)
        except Waiting as waiting:
            raise self.unavailable(waiting.error) from None

    def close(self) -> None:
        """End the listener and the connections. What waits raises :class:`UsageError`. Harmless when repeated."""
        self._closed = True
        self.callbacks.close()
        self.replies.close()
        self._lanes.close()
        if self._owned:
            self._connection.close()

    def _publish(self, channel: str, word: bytes) -> None:
        """Tell the listener something; it looks around by itself soon if that fails."""
        with suppress(PerdureError, Waiting):
            # Also from close(): the listener is to end now, and not after its slice.
            self._attempt(lambda store: store.connection.publish(channel, word), 0.0)

    def _look(self, places: Sequence[tuple[str, LogPlace]]) -> Sequence[LogPage]:
        """Pages of logs for the listener; none if they cannot be read now: who waits asks himself, and is told why."""
        with suppress(Exception):
            return self._attempt(lambda store: store.look((), places), 0.0)[1]
        return ()

    def unavailable(self, error: Exception) -> RedisUnavailable:
        """What to tell the user about this error of redis-py."""
        # Raised "from None" by the callers: the original error's text may hold the password.
        return explain(error, self._url)


_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _in_child() -> None:
    for session in list(_sessions):
        session.forked()


os.register_at_fork(after_in_child=_in_child)
