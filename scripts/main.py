"""``perdure``: the command line.

Data goes to stdout, messages go to stderr. Exit codes: 0; 1 the request failed or was canceled; 2 a mistake in
the call; 3 Redis cannot be reached; 4 the pool is unhealthy (nothing came in time, or it takes nothing now);
130 after Ctrl-C. A command is imported when it is called: the others' libraries cost it nothing.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import __version__

OK, FAILED, USAGE, UNREACHABLE, UNHEALTHY, INTERRUPTED = 0, 1, 2, 3, 4, 130

# name -> (module of this package, attribute, one line for the list of commands)
COMMANDS = {
    "demo": ("demonstration.command", "demo", "Watch real generations survive kill -9."),
    "chaos": ("chaos.command", "chaos", "Inject faults into a pool and check every request."),
    "up": ("pool.up", "up", "Run a reaper and workers in the foreground."),
    "worker": ("cli.processes", "worker", "Run one worker."),
    "reaper": ("cli.processes", "reaper", "Requeue the requests of dead workers."),
    "submit": ("cli.submitting", "submit", "Put a request on a queue."),
    "batch": ("batch.command", "batch", "Run the lines of a batch file."),
    "show": ("cli.views", "show", "Show one request, or draw it."),
    "list": ("cli.views", "list_", "List requests."),
    "queues": ("inspect_queues", "queues", "List queues: depth, age and throughput."),
    "workers": ("cli.workers", "workers", "List workers and devices."),
    "metrics": ("cli.metrics", "metrics", "Serve metrics for Prometheus."),
    "leases": ("inspect_leases", "leases", "List leases, the next to expire first."),
    "checkpoints": ("inspect_checkpoints", "checkpoints", "List checkpoints, the oldest first."),
    "dead-letters": ("inspect_dead_letters", "dead_letters", "Group failures by error and requeue them."),
    "redis": ("inspect_redis", "redis_", "Show Redis load."),
    "inspect-key": ("inspect_key", "inspect_key", "Decode one key."),
    "top": ("cli.top", "top", "Watch a pool."),
    "web": ("web.command", "web", "Serve a page that shows a pool."),
    "doctor": ("cli.doctor", "doctor", "Check a deployment and suggest changes."),
    "config": ("cli.config", "config", "Show the settings and where they come from."),
    "completion": ("cli.completion", "completion", "Print a shell completion script."),
    "result": ("cli.views", "result", "Wait for a request and print its result."),
    "cancel": ("cli.moves", "cancel", "Cancel requests."),
    "requeue": ("cli.moves", "requeue", "Send failed requests back to their queues."),
}

# package -> the extra that brings it; "demo" brings all others
EXTRAS = {"prometheus_client": "metrics", "starlette": "web", "uvicorn": "web"}


_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOENT, errno.ENOTDIR)


class Commands(click.Group):
    """Finds commands by name, and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _, _) in COMMANDS.items() if _exists(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        try:
            command = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(error.name or "", "demo")
            raise click.UsageError(
                f'"perdure {cmd_name}" needs the package {error.name}, which is not installed. '
                f'Run: pip install "perdure[{extra}]"'
            ) from None
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near and self.get_command(ctx, args[0]) is None:
                raise click.UsageError(f"{error.message} Did you mean {near[0]}?", ctx) from None
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, but from the table: listing commands must not import them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(f"{__package__}.{module}") is not None
    except ModuleNotFoundError:
        return False  # its folder is not there: that of chaos is in no wheel


EPILOG = """\b
Examples:
  perdure up gpu --workers 2
  perdure submit app.tasks.count '{"n": 3}' --queue gpu --stream
  perdure list --status failed
  perdure show ID

Redis is found by --url, PERDURE_REDIS_URL, RQ_REDIS_URL, or a running embedded server."""


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="perdure")
def perdure() -> None:
    """Inference requests that outlive the workers running them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names and return its exit code."""
    return run(perdure, argv, "perdure")


def run_file(name: str) -> None:
    """Run one command as its file, ``python scripts/inspect_….py``, was started, and exit."""
    command = perdure.get_command(click.Context(perdure), name)
    assert command is not None, name
    sys.exit(run(command, None, Path(sys.argv[0]).name))


def run(command: click.Command, argv: Sequence[str] | None, name: str) -> int:
    """Run a command and return its exit code; errors a person can cause are one message on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    stdout = sys.stdout
    options: dict[str, Any] = {"color": False} if os.environ.get("NO_COLOR") else {}
    try:
        code = command.main(args=argv, prog_name=name, standalone_mode=False, **options)
        sys.stdout.flush()
    except SystemExit as leave:
        if sys.stdout is not stdout:
            return (
                OK  # click has met the end of a pipe and put its own file there: the reader has seen enough ("| head")
            )
        raise leave from None
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return USAGE
    except BrokenPipeError:
        # The reader has seen enough ("| head"). Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return _explain(error)
    return code if isinstance(code, int) else OK


def _explain(error: Exception) -> int:
    """Say what went wrong and return the exit code. What is not a known error is a bug, with its traceback."""
    import redis

    from ..protocol.errors import (
        PerdureError,
        RedisUnavailable,
        RequestCanceled,
        RequestFailed,
        UnknownRequest,
        UsageError,
    )

    match error:
        case RedisUnavailable():
            code = UNREACHABLE
        case UsageError() | UnknownRequest():
            code = USAGE
        case RequestFailed() | RequestCanceled():
            code = FAILED
        case OSError() if error.errno in _PLACES:
            # A place that cannot be written or is not there is told as one; any other error of the system is a bug's.
            error = PerdureError(
                f"{error.strerror}: {error.filename or 'set TMPDIR and XDG_STATE_HOME to folders of yours'}"
            )
            code = UNHEALTHY
        case PerdureError() | TimeoutError():
            code = UNHEALTHY
        case redis.RedisError():
            from ..protocol.transport.explaining import (
                explain,  # not above: it fails where RQ_KEY_PREFIX is the mistake
            )

            error, code = explain(error, ""), UNREACHABLE  # what was raised where nobody knows the address
        case _:
            raise error
    click.echo(f"perdure: {error}", err=True)
    for note in getattr(error, "__notes__", ()):
        click.echo(f"  {note}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
