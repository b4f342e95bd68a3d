"""The reaper as a process of its own: ``perdure reaper`` and ``python -m perdure.recovery``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields
from typing import Final

from ..protocol.connection import connect, resolve_url
from ..protocol.errors import ProtocolMismatch, RedisUnavailable, UsageError
from ..protocol.settings import Settings, redact
from ..protocol.telemetry import logs
from ..protocol.transitions.sweeps import Sweeps
from .reaper import Reaper

OK, USAGE, UNREACHABLE, UNHEALTHY = 0, 2, 3, 4

# The settings that rule a reaper. They should be the same for all of a pool; the environment sets them for all.
_FLAGS: Final = (
    "heartbeat", "heartbeat_timeout", "checkpoint_ttl", "retry_base", "retry_cap", "max_crashes", "max_crashes_total",
    "max_executions", "reap_interval", "capacity", "log_format",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a reaper until SIGTERM or SIGINT. Returns the exit code.

    0 after a signal, 2 for a mistake in flags or environment, 3 if Redis does not answer at the start (later
    it is waited for), 4 if Redis holds a newer protocol.
    """
    arguments = _parser().parse_args(argv)
    try:
        changes = {name: getattr(arguments, name) for name in _FLAGS}
        settings = Settings.from_environment(strict=True).replace(redis_url=arguments.redis_url, **changes)
        logs.configure(settings.log_format, date_format=None)
        url = resolve_url(settings)
        connection = connect(url, name="perdure-reaper", wait=logging.getLogger("perdure.reaper").warning)
    except UsageError as error:
        return _refuse(error, USAGE)
    except RedisUnavailable as error:
        return _refuse(error, UNREACHABLE)
    stop = threading.Event()
    _set_on_signals(stop)
    reaper = Reaper(Sweeps(connection, settings), settings, name=arguments.name)
    logging.getLogger("perdure.reaper").info(
        "%s: sweeping %s every %g s", reaper.name, redact(url), settings.reap_interval
    )
    with connection:
        try:
            reaper.run(stop)
        except ProtocolMismatch as error:
            return _refuse(error, UNHEALTHY)
    return OK


def _refuse(error: Exception, code: int) -> int:
    sys.stderr.write(f"perdure reaper: {error}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perdure reaper",
        description="Requeue the requests of dead workers.",
        epilog="Examples:\n  perdure reaper\n  perdure reaper --url redis://localhost:6379",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    helps = {item.name: item.metadata["help"] for item in fields(Settings)}
    kinds = {item.name: type(item.default) for item in fields(Settings)}
    parser.add_argument("--redis-url", "--url", default=None, metavar="URL", help=helps["redis_url"])
    parser.add_argument("--name", default="", help="what log lines begin with")
    for name in _FLAGS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kinds[name], default=None, metavar="N", help=helps[name])
    return parser


def _set_on_signals(stop: threading.Event) -> None:
    """Let SIGTERM and SIGINT set ``stop``; a second one ends the process at once, which a reaper can bear.

    A thread waits for them: an ordinary handler runs in the middle of ``stop.wait()``, and ``stop.set()`` would
    then wait for a lock that its own thread holds.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        signal.sigwait(signals)
        stop.set()
        number = signal.sigwait(signals)
        os._exit(128 + number)

    threading.Thread(target=wait, name="signals", daemon=True).start()
