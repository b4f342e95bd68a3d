"""A subscription: the one connection on which a client hears hints. For its listener's thread alone."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, Final, NamedTuple, Self

import redis

from ...protocol.keys import key

PING_AFTER: Final = 5.0
"""Seconds of silence after which it is asked whether the connection still lives."""

MOST: Final = 512
"""Channels that one command names, and messages that are read before they are acted upon."""


class Hint(NamedTuple):
    """What came: ``request`` and ``what`` of a message; or the name of a channel that is listened to from now on."""

    request: str
    what: bytes
    channel: str = ""


class Subscription:
    """Names of channels stand without what all of them begin with. Everything raises what redis-py raises."""

    def __init__(self, connection: redis.Redis) -> None:
        """``connection`` is closed with it."""
        self._connection = connection
        self._pubsub: Any = connection.pubsub()  # type: ignore[no-untyped-call]
        self._last, self._pinged = time.monotonic(), False

    def change(self, join: Collection[str], leave: Collection[str]) -> None:
        """Listen to these channels, and to those no more."""
        if join:
            self._pubsub.subscribe(*(key("replies", channel) for channel in join))
        if leave:
            self._pubsub.unsubscribe(*(key("replies", channel) for channel in leave))

    def hints(self, seconds: float) -> list[Hint]:
        """All that is there, up to some; at most so many seconds are waited for the first.

        Raises ``redis.TimeoutError`` when the connection is silent and a ping was not answered.
        """
        messages = self._messages(seconds)
        now = time.monotonic()
        if messages:
            self._last, self._pinged = now, False
        elif now - self._last > 2 * PING_AFTER:
            raise redis.TimeoutError("the server did not answer a ping")
        elif now - self._last > PING_AFTER and not self._pinged:
            self._pubsub.ping()
            self._pinged = True
        return [hint for message in messages if (hint := self._hint(message))]

    def _messages(self, seconds: float) -> list[Any]:
        """``get_message`` takes twice as long for one, and there may be thirty thousand a second."""
        first = self._pubsub.parse_response(block=False, timeout=seconds)
        if first is None:
            return []
        messages, connection = [first], self._pubsub.connection
        while len(messages) < MOST and connection.can_read(timeout=0):
            messages.append(connection.read_response(disconnect_on_error=False, push_request=True))
        return messages

    def _hint(self, message: Any) -> Hint | None:
        if message[0] == b"message":
            identifier, _, what = message[2].partition(b" ")
            return Hint(identifier.decode(errors="replace"), what) if what else None
        told = self._pubsub.handle_message(message)
        if told is None or told["type"] != "subscribe":
            return None
        return Hint("", b"", told["channel"].decode(errors="replace").removeprefix(key("replies")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._pubsub.close()
            self._connection.close()
        except (redis.RedisError, OSError):
            pass  # it was broken already
