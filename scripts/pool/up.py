"""``perdure up``: a pool in the foreground, with a Redis of its own if none is configured."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from pathlib import Path

import click

from ...protocol.connection import connect, running_server, state_folders
from ...protocol.errors import SettingsError
from ...protocol.keys import check_queue
from ...protocol.settings import Settings, redact
from ...protocol.store import Store
from ...protocol.telemetry import logs
from ...protocol.transport.explaining import explained
from ...workers.pool.gpus import Gpu, choose, open_devices
from ...workers.pool.notify import Notifier
from ...workers.text import check_engine
from .pool import Pool
from .server import Server, announce, withdraw

log = logging.getLogger("perdure.pool")


def run(
    settings: Settings,
    queues: list[str],
    workers: int,
    folder: str | None = None,
    *,
    spares: int = 0,
    gpus: str | None = None,
) -> int:
    """Run a pool until SIGTERM or SIGINT; returns the exit status.

    ``gpus``: as :func:`perdure.workers.pool.gpus.choose` takes it; then ``workers`` is not read. Raises
    ``UsageError`` for a bad queue name or a GPU that is not there, and ``RedisUnavailable`` for a server that does
    not answer.
    """
    for queue in queues:
        check_queue(queue)
    logs.configure(settings.log_format)
    notifier = Notifier.from_environment()
    chosen = _chosen(gpus, settings)
    told = _signals()
    with contextlib.ExitStack() as stack:
        url = settings.redis_url or _own_server(stack, folder)
        connection = connect(url, wait=log.warning)
        with explained(url):
            Store(connection, settings).check_protocol()
        connection.close()
        named = not logs.wants_json(settings.log_format)
        if named:  # "auto" looks for a terminal, and children print into a pipe
            settings = settings.replace(log_format="text")
        pool = Pool(
            url,
            queues,
            workers,
            settings,
            spares=spares,
            gpus=chosen,
            notifier=notifier,
            named=named,
            release=f"kill -USR1 {os.getpid()}",
        )
        what = f"GPUs {', '.join(gpu.token for gpu in chosen)}" if chosen else f"{workers} worker(s)"
        log.info("%s, %d spare(s) on %s, queues: %s", what, spares, redact(url), ", ".join(queues))
        pool.start()
        try:
            _attend(pool, told, notifier)
        finally:
            clean = pool.stop() if not pool.join(0) else pool.supervisor.done and not pool.supervisor.killed
    return 0 if clean else 4


def _chosen(gpus: str | None, settings: Settings) -> list[Gpu]:
    if gpus is None:
        return []
    if settings.device not in ("auto", "cuda"):
        raise SettingsError(
            f"--gpus gives each worker a GPU of its own, but PERDURE_DEVICE is {settings.device}; leave it out"
        )
    return choose(gpus, devices=open_devices())


def _attend(pool: Pool, told: socket.socket, notifier: Notifier) -> None:
    """Carry out what signals ask for, until nothing is left of the pool."""
    stops = 0
    while not pool.join(0.1 if stops else 0):
        told.settimeout(0.1 if stops else 1.0)
        try:
            numbers = told.recv(16)
        except TimeoutError:
            continue
        for number in numbers:
            if number == signal.SIGUSR1:
                pool.release_quarantined()
            elif number in STOPS:
                stops += 1
                log.info("%s", _STOPPING[min(stops, len(_STOPPING)) - 1])
                notifier.stopping()
                pool.ask_to_stop()


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that drain the pool. SIGHUP comes when a terminal is closed."""

_STOPPING = (
    "stopping: workers store their checkpoints and hand their requests back",
    "stopping at once: running steps are not waited for",
    "killing what is left",
)


def _signals() -> socket.socket:
    """A socket that gets the number of each signal, as one byte.

    Not an Event set by a handler: that runs in the middle of ``wait()`` and can need the lock its own thread
    holds. Not a blocked mask and ``sigwait``: the children would inherit the mask.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in (*STOPS, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
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
    epilog="""\b
Examples:
  perdure up gpu --workers 2
  perdure up gpu --gpus all --tasks app.tasks.Generate
  perdure up gpu --gpus 0,2 --spares 2
  perdure up gpu --engine vllm --model /models/Qwen3-8B --engine-arg max_model_len=8192
  perdure up gpu --reload

A place is quarantined if its process keeps ending or its GPU needs repair; the log says why. SIGUSR1 retries all of
them. A second Ctrl-C or SIGTERM does not wait for running steps, a third one kills."""
)
@click.argument("queues", nargs=-1, required=True, metavar="QUEUE...")
@click.option("--workers", type=click.IntRange(1, 256), help="Worker processes; default 1.")
@click.option("--gpus", metavar="all|N,N", help="One worker for each of these GPUs, as nvidia-smi numbers them.")
@click.option(
    "--spares",
    default=0,
    type=click.IntRange(0, 256),
    help="Workers that stay loaded and claim only when another one is lost; with --gpus spread over these in turn.",
)
@click.option("--url", help="Redis; else PERDURE_REDIS_URL, RQ_REDIS_URL, or an embedded server.")
@click.option("--tasks", help="Dotted paths, comma-separated, that workers load before they claim.")
@click.option("--engine", help="What computes in text generation, loaded before the first claim: see PERDURE_ENGINE.")
@click.option("--model", help="The model of text generation: see PERDURE_MODEL.")
@click.option(
    "--engine-arg", "engine_args", multiple=True, metavar="NAME=VALUE", help="An argument of the engine itself."
)
@click.option("--reload", is_flag=True, help="Restart workers when code that they have loaded is edited.")
@click.option("--data", metavar="FOLDER", help="Where the embedded server keeps its data.")
def up(
    queues: tuple[str, ...],
    workers: int | None,
    gpus: str | None,
    spares: int,
    url: str | None,
    tasks: str | None,
    engine: str | None,
    model: str | None,
    engine_args: tuple[str, ...],
    reload: bool,
    data: str | None,
) -> None:
    """Run a reaper and workers in the foreground and replace those that die. Ctrl-C or SIGTERM drains them."""
    if gpus is not None and workers is not None:
        raise click.UsageError("--gpus and --workers cannot be combined: a GPU takes one worker.")
    settings = Settings.from_environment(strict=True).replace(redis_url=url)
    if reload:
        settings = settings.replace(reload=True)
    if tasks:
        settings = settings.replace(tasks=tuple(part.strip() for part in tasks.split(",") if part.strip()))
    elif engine:
        settings = settings.replace(tasks=("perdure.workers.text.generate",))
    settings = settings.replace(engine=engine, model=model, engine_args=engine_args or None)
    check_engine(settings.engine)
    raise SystemExit(run(settings, list(queues), workers or 1, data, spares=spares, gpus=gpus))
