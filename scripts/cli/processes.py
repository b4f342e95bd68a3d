"""``perdure worker`` and ``reaper``: the processes of a pool, each in the foreground."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any, NoReturn

import click

from ...protocol.connection import connect, resolve_url
from ...protocol.keys import check_queue
from ..present.console import read_settings, setting_options, url_option

WORKER_CLASS = "perdure.workers.Worker"


@click.command(
    epilog="""\b
Examples:
  perdure worker gpu
  perdure worker high low --tasks app.tasks.count --device cuda
  perdure worker gpu -- --max-idle-time 60

Arguments after -- go to "rq worker" unchanged."""
)
@click.argument("queues", metavar="QUEUE...", nargs=-1, required=True)
@click.option("--name", "-n", metavar="NAME", help="RQ's name for the worker; default: a random one.")
@click.option("--burst", "-b", is_flag=True, help="Exit when the queues are empty.")
@click.option("--max-jobs", type=click.IntRange(min=1), metavar="N", help="Exit after N requests.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
@click.option("--quiet", "-q", is_flag=True, help="Log less.")
@setting_options(
    "tasks",
    "heartbeat",
    "heartbeat_timeout",
    "step_timeout",
    "load_timeout",
    "checkpoint_interval",
    "checkpoint_ttl",
    "drain_timeout",
    "model",
    "model_path",
    "device",
    "dtype",
    "slots",
    "threads",
    "log_format",
)
@url_option
def worker(
    queues: tuple[str, ...],
    name: str | None,
    burst: bool,
    max_jobs: int | None,
    verbose: bool,
    quiet: bool,
    url: str | None,
    **changes: Any,
) -> NoReturn:
    """Run one worker: "rq worker -w perdure.workers.Worker QUEUE...", with these settings.

    Queues are served in the order given. SIGTERM or Ctrl-C: what runs is checkpointed and handed back; a second
    signal ends it at once.
    """
    cut = next((place for place, word in enumerate(queues) if word.startswith("-")), len(queues))
    queues, rest = queues[:cut], queues[cut:]
    if not queues:
        raise click.UsageError("Missing argument 'QUEUE...'.")
    for queue in queues:
        check_queue(queue)
    settings = read_settings(url, **changes)
    settings = settings.replace(redis_url=resolve_url(settings))
    connect(settings.redis_url, wait=partial(click.echo, err=True)).close()
    options = ["--name", name] if name else []
    options += ["--max-jobs", str(max_jobs)] if max_jobs else []
    options += [flag for flag, given in (("--burst", burst), ("--verbose", verbose), ("--quiet", quiet)) if given]
    # By the environment, not as an argument: everybody can read those, and a URL may hold a password.
    environment = {**os.environ, **settings.environment(), "RQ_REDIS_URL": settings.redis_url}
    # -P: the current folder comes on the path when RQ puts it there, not before the standard library.
    command = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", WORKER_CLASS, *options, *rest, "--", *queues]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


@click.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def reaper(arguments: tuple[str, ...]) -> int:
    """Requeue the requests of dead workers. The same as "python -m perdure.recovery"."""
    from ...recovery.command import main

    return main(arguments)
