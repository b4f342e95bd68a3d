"""The start of a worker: whether it can work with this RQ and this Redis. What passes is waited for, and all else is
said in plain words.

``rq worker`` asks Redis whether the pool is suspended before it makes a worker: a server that loads its data would end
it, and one that is busy with a traceback of redis-py's. RQ has no hook between the import of a worker's class and this
question, so :func:`greet` puts itself before the question, for RQ's command alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import redis
from rq.version import VERSION

from ...protocol.errors import PerdureError, ProtocolMismatch, RedisUnavailable
from ...protocol.keys import check_queue
from ...protocol.packed_state import check_compression
from ...protocol.queries.deployment import ServerProblem, look_at
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...protocol.transport.explaining import url_of
from ...protocol.transport.patience import when_it_may
from ..guardian.companion import private_connection

TESTED_RQ = ("3.0",)
"""Releases of RQ (major.minor) whose keys and worker hooks this release was tested with."""

Answer = TypeVar("Answer")

_log = logging.getLogger("rq.worker")


def release() -> str:
    """Which release of Perdure this is, for the log."""
    try:
        return version("perdure")
    except PackageNotFoundError:
        return "from a folder"  # which is on the path, and was not installed


def begin(connection: redis.Redis, queues: Iterable[str]) -> tuple[Settings, Store, list[ServerProblem]]:
    """The settings, a store of the worker's own, and what it should be warned of.

    Exits the process with status 1 and a message when a worker cannot begin.
    """
    try:
        settings = Settings.from_environment(strict=True)
        check_rq(settings)
        check_compression(settings.compression)
        for queue in queues:
            check_queue(queue)
        store = Store(private_connection(connection, timeout=patience(settings)), settings)
        arrive(connection, store.check_protocol)
        findings = arrive(connection, lambda: look_at(store.connection))
    except PerdureError as error:
        sys.exit(f"perdure worker: {error}")
    for finding in findings:
        if finding.fatal:
            sys.exit(f"perdure worker: {finding}")
    return settings, store, findings


def check_rq(settings: Settings) -> None:
    """Raise :class:`ProtocolMismatch` on an RQ that was not tested, unless a setting allows it."""
    series = ".".join(VERSION.split(".")[:2])
    if series not in TESTED_RQ and not settings.untested_rq:
        raise ProtocolMismatch(
            f"RQ {VERSION} was not tested with this release (tested: {', '.join(TESTED_RQ)}); "
            "install a tested one, or set PERDURE_UNTESTED_RQ=1 to run with it anyway"
        )


def patience(settings: Settings) -> float:
    """Seconds that a call to Redis may take."""
    # Longer than the longest blocking call (1 s on the bells), shorter than what would cost a lease.
    return max(2.0, min(5.0, settings.lease / 3))


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
