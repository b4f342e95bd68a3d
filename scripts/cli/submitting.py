"""``perdure submit``, and how a request is followed to its end."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from ...producer.arguments import DEFAULT
from ...producer.options import Options
from ...producer.reading.lateness import NotYet
from ...protocol.errors import PerdureError, RequestCanceled, RequestFailed
from ...protocol.keys import with_priority
from ..options import option_flags, read_json, read_options
from ..present.console import (
    json_option,
    open_client,
    print_json,
    print_value,
    say_if_degraded,
    timeout_option,
    url_option,
    visible,
)

if TYPE_CHECKING:
    from ...producer import Handle


@click.command(
    epilog="""\b
Examples:
  perdure submit app.tasks.count '{"n": 3}' --queue gpu
  perdure submit perdure.workers.text.generate '{"prompt": "Hello", "max_tokens": 20}' --stream
  perdure submit app.tasks.count - --wait --json < payload.json"""
)
@click.argument("task")
@click.argument("payload", metavar="JSON", default="{}")
@option_flags(*(item.name for item in fields(Options)))
@click.option("--wait", is_flag=True, help="Wait for the end and print the result.")
@click.option("--stream", is_flag=True, help="Print outputs as they come.")
@timeout_option("With --wait: longest time until the end; with --stream: until the next output.")
@json_option
@url_option
def submit(
    task: str,
    payload: str,
    wait: bool,
    stream: bool,
    timeout: float | None,
    as_json: bool,
    url: str | None,
    **options: Any,
) -> None:
    """Put a request on a queue and print its id.

    TASK is a dotted path such as app.tasks.count; JSON is its payload ({} if it is left out), or - to read it from
    stdin.
    """
    value = read_json(payload)
    if timeout is not None and not (wait or stream):
        raise click.UsageError("--timeout goes with --wait or --stream")
    with open_client(url) as client:
        say_if_degraded(client)
        handle = client.submit(task, value, **read_options(options))
        if wait or stream:
            click.echo(f"request {handle.id}", err=True)
            follow(handle, wait=wait, stream=stream, timeout=timeout, as_json=as_json)
        elif as_json:
            print_json({"id": handle.id, "queue": with_priority(options["queue"], options["priority"])})
        else:
            click.echo(handle.id)


def follow(handle: Handle, *, wait: bool, stream: bool, timeout: float | None, as_json: bool, start: int = 0) -> None:
    """Print outputs (``stream``) and the result (``wait``) of a request; raises what they raise.

    With ``as_json``: a line for each output, and one for the end, whatever it is.
    """
    try:
        if stream:
            _print_outputs(handle, start, timeout, as_json)
        result = handle.result(DEFAULT if timeout is None else timeout)
    except NotYet as error:
        raise TimeoutError(
            f"{error.what}. It goes on; wait for it again with: perdure result {handle.id} --timeout SECONDS, or "
            f"look at it with: perdure show {handle.id}"
        ) from None
    except (RequestFailed, RequestCanceled) as error:
        if as_json:
            print_json(_ending(handle, error))
        raise
    except KeyboardInterrupt:
        click.echo(f"\nThe request goes on. Wait for it again with: perdure result {handle.id}", err=True)
        raise
    if as_json:
        print_json({"id": handle.id, "status": "finished", "result": result})
    elif wait:
        print_value(result)


def _print_outputs(handle: Handle, start: int, timeout: float | None, as_json: bool) -> None:
    within_line = False
    try:
        for offset, output in enumerate(handle.stream(start, timeout=DEFAULT if timeout is None else timeout), start):
            if as_json:
                print_json({"offset": offset, "output": output})
            elif isinstance(output, dict) and isinstance(output.get("text"), str):
                # A generation: pieces of one text.
                click.echo(visible(output["text"]), nl=False)
                within_line = True
            else:
                print_value(output)
            sys.stdout.flush()
    finally:
        if within_line:
            click.echo()


def _ending(handle: Handle, error: PerdureError) -> dict[str, Any]:
    if isinstance(error, RequestFailed):
        return {"id": handle.id, "status": "failed", "error": {"kind": error.kind, "reason": error.reason}}
    assert isinstance(error, RequestCanceled)
    return {"id": handle.id, "status": error.status, "error": None}
