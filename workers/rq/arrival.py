"""The start of a worker, as far as Redis is concerned: what passes is waited for, and all else is said in plain words.

``rq worker`` asks Redis whether the pool is suspended before it makes a worker: a server that loads its data would end
it, and one that is busy with a traceback of redis-py's. RQ has no hook between the import of a worker's class and this
question, so :func:`greet` puts itself before the question, for RQ's command alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import redis

from ...protocol.errors import RedisUnavailable
from ...protocol.transport.explaining import url_of
from ...protocol.transport.patience import when_it_may

Answer = TypeVar("Answer")

_log = logging.getLogger("rq.worker")


def arrive(connection: redis.Redis, call: Callable[[], Answer]) -> Answer:
    """What ``call`` returns, once Redis takes it. Exits the process with status 1 if it does not answer."""
    try:
        return when_it_may(call, url_of(connection), _log.warning)
    except RedisUnavailable as error:
        sys.exit(f"perdure worker: {error}")


def greet() -> None:
    """To be called once, when the worker's module is imported; does something only where RQ's command imports it."""
    command: Any = sys.modules.get("rq.cli.workers")
    if question := getattr(command, "is_suspended", None):
        command.is_suspended = lambda connection: arrive(connection, lambda: question(connection))
