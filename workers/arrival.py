"""The start of a worker, as far as Redis is concerned: what passes is waited for, and all else is said in plain words.

``rq worker`` asks Redis whether the pool is suspended before it makes a worker. What comes of that would be an error of
redis-py's with its traceback; so where RQ's command runs, it asks through :func:`asked`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import redis

from ..protocol.errors import RedisUnavailable
from ..protocol.explaining import url_of
from ..protocol.patience import when_it_may

Answer = TypeVar("Answer")

COMMAND = "rq.cli.workers"
"""RQ's module whose commands start workers."""

_log = logging.getLogger("rq.worker")


def arrive(connection: redis.Redis, call: Callable[[], Answer]) -> Answer:
    """What ``call`` returns, once Redis takes it. Exits the process with status 1 if it does not answer."""
    try:
        return when_it_may(call, url_of(connection), _log.warning)
    except RedisUnavailable as error:
        sys.exit(f"perdure worker: {error}")


def asked(question: Callable[..., Any]) -> Callable[..., Any]:
    """A question of RQ's to Redis, whose first argument is the connection."""

    def ask(connection: redis.Redis, *arguments: Any) -> Any:
        return arrive(connection, lambda: question(connection, *arguments))

    return ask


def greet() -> None:
    """To be called once, when RQ's command imports our worker."""
    command: Any = sys.modules.get(COMMAND)
    if command is not None and hasattr(command, "is_suspended"):
        command.is_suspended = asked(command.is_suspended)
