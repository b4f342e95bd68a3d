"""``perdure up``: a pool in the foreground, with a Redis of its own if none is configured."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from pathlib import Path

import click

from ..protocol.connection import connect, running_server, state_folders
from ..protocol.keys import check_queue
from ..protocol.settings import Settings, redact
from ..protocol.store import Store
from .pool import Pool
from .server import Server, announce, withdraw

log = logging.getLogger("perdure.pool")


def run(settings: Settings, queues: list[str], workers: int, folder: str | None = None) -> int:
    """Run a pool until SIGTERM or SIGINT; returns the exit status.

    Raises ``UsageError`` for a bad queue name and ``RedisUnavailable`` for a server that does not answer.
    """
    for queue in queues:
        check_queue(queue)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    told = _stop_signals()
    with contextlib.ExitStack() as stack:
        url = settings.redis_url or _own_server(stack, folder)
        connection = connect(url)
        Store(connection, settings).check_protocol()
        connection.close()
        pool = Pool(url, queues, workers, settings)
        log.info("%d worker(s) on %s, queues: %s", workers, redact(url), ", ".join(queues))
        pool.start()
        try:
            told.recv(1)
            log.info("stopping: workers store their checkpoints and hand their requests back")
        finally:
            clean = pool.stop()
    return 0 if clean else 4


def _stop_signals() -> socket.socket:
    """A socket that gets a byte on SIGTERM and SIGINT.

    Not an Event set by a handler: that runs in the middle of ``wait()`` and can need the lock its own thread
    holds. Not a blocked mask and ``sigwait``: the children would inherit the mask.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return ours


def _own_server(stack: contextlib.ExitStack, folder: str | None) -> str:
    """The URL of the embedded server: the one that runs already, or one of this pool's own."""
    running = running_server()
    if running is not None:
        log.info("using the embedded server at %s (pid %d)", running.url, running.pid)
        return running.url
    place = Path(folder) if folder else state_folders()[0] / "redis"
    server = stack.enter_context(Server(place, die_with_parent=True))
    announce(server)
    stack.callback(withdraw, server)
    log.info("started an embedded server at %s, data in %s", server.url, place)
    return server.url


@click.command(
    epilog="\b\nExamples:\n  perdure up gpu --workers 2\n  PERDURE_REDIS_URL=redis://redis:6379 perdure up gpu --workers 4"
)
@click.argument("queues", nargs=-1, required=True, metavar="QUEUE...")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Worker processes.")
@click.option("--url", help="Redis; else PERDURE_REDIS_URL, RQ_REDIS_URL, or an embedded server.")
@click.option("--tasks", help="Dotted paths, comma-separated, that workers load before they claim.")
@click.option("--data", metavar="FOLDER", help="Where the embedded server keeps its data.")
def up(queues: tuple[str, ...], workers: int, url: str | None, tasks: str | None, data: str | None) -> None:
    """Run a reaper and workers in the foreground; the dead are replaced. Ctrl-C or SIGTERM drains them."""
    settings = Settings.from_environment(strict=True).replace(redis_url=url)
    if tasks:
        settings = settings.replace(tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()))
    raise SystemExit(run(settings, list(queues), workers, data))
