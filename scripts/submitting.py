"""``perdure submit``, and how a request is followed to its end."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..producer.arguments import DEFAULT
from ..producer.questions import NotYet
from ..protocol.errors import PerdureError, RequestCanceled, RequestFailed
from ..protocol.keys import Priority, with_priority
from .console import (
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
    from ..producer import Handle


@click.command(
    epilog="""\b
Examples:
  perdure submit app.tasks.count '{"n": 3}' --queue gpu
  perdure submit perdure.workers.text.generate '{"prompt": "Hello", "max_tokens": 20}' --stream
  perdure submit app.tasks.count - --wait --json < payload.json"""
)
@click.argument("task")
@click.argument("payload", metavar="JSON", default="{}")
@click.option("--queue", default="default", show_default=True, metavar="NAME", help="The queue it waits in.")
@click.option("--priority", default="normal", show_default=True, metavar="WORD", help="high, normal or low.")
@click.option("--id", "identifier", metavar="ID", help="Choose its id: letters, digits, '_' and '-'.")
@click.option(
    "--idempotency-key",
    metavar="TEXT",
    help="Submit only once: the same key with the same payload gives the same request.",
)
@click.option("--delay", type=float, default=0.0, metavar="SECONDS", help="Enqueue it after this many seconds.")
@click.option("--deadline", type=float, metavar="SECONDS", help="Fail it if it has not ended after this many seconds.")
@click.option(
    "--queue-timeout",
    type=float,
    metavar="SECONDS",
    help="Fail it if no worker has claimed it after this many seconds.",
)
@click.option("--durable", is_flag=True, help="Return only once it is on disk.")
@click.option("--meta", metavar="JSON", help="A JSON object to store with it, for people and RQ's tools.")
@click.option("--step-timeout", type=float, metavar="SECONDS", help="Seconds that one step of this request may take.")
@click.option("--degraded", metavar="JSON", help="Fields that replace those of the payload while the pool is degraded.")
@click.option("--max-retries", type=int, metavar="N", help="Retries after failures; default: the worker's setting.")
@click.option("--retry-when-degraded", is_flag=True, help="Retry while a degraded pool refuses low priority.")
@click.option("--wait", is_flag=True, help="Wait for the end and print the result.")
@click.option("--stream", is_flag=True, help="Print outputs as they come.")
@timeout_option("With --wait: longest time until the end; with --stream: until the next output.")
@json_option
@url_option
def submit(
    task: str, payload: str, queue: str, priority: Priority, identifier: str | None, idempotency_key: str | None,
    delay: float, deadline: float | None, queue_timeout: float | None, durable: bool, meta: str | None,
    step_timeout: float | None, degraded: str | None, max_retries: int | None, retry_when_degraded: bool,
    wait: bool, stream: bool, timeout: float | None, as_json: bool, url: str | None,
) -> None:  # fmt: skip
    """Put a request on a queue and print its id.

    TASK is a dotted path such as app.tasks.count; JSON is its payload ({} if it is left out), or - to read it from
    stdin.
    """
    value = _read_json(payload)
    if timeout is not None and not (wait or stream):
        raise click.UsageError("--timeout goes with --wait or --stream")
    with open_client(url) as client:
        say_if_degraded(client)
        handle = client.submit(
            task,
            value,
            queue=queue,
            priority=priority,
            id=identifier,
            idempotency_key=idempotency_key,
            delay=delay,
            deadline=deadline,
            queue_timeout=queue_timeout,
            durable=durable,
            meta=None if meta is None else _read_json(meta, "--meta"),
            step_timeout=step_timeout,
            degraded=None if degraded is None else _read_json(degraded, "--degraded"),
            max_retries=max_retries,
            retry_when_degraded=retry_when_degraded,
        )
        if wait or stream:
            click.echo(f"request {handle.id}", err=True)
            follow(handle, wait=wait, stream=stream, timeout=timeout, as_json=as_json)
        elif as_json:
            print_json({"id": handle.id, "queue": with_priority(queue, priority)})
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


def _read_json(argument: str, what: str = "the payload") -> Any:
    """The payload. Raises ``click.UsageError`` that shows where it is wrong."""
    text = argument
    if argument == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{what} on stdin is not UTF-8: byte {error.start}") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text.strip() else ""
        begin = max(0, error.colno - 30)
        shown, place = visible(line[begin : error.colno + 30]), " " * (error.colno - 1 - begin)
        picture = f"\n  {shown}\n  {place}^" if line else ""
        raise click.UsageError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}{picture}"
        ) from None
    except RecursionError:
        raise click.UsageError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise click.UsageError(f"{what} is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
