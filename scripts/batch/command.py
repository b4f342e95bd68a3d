"""``perdure batch``: a file of requests in, a file of answers out."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click

from ...producer.session import PATIENCE, Session
from ...protocol.errors import UsageError
from ...protocol.keys import check_queue, with_priority
from ...protocol.limits import MAX_REQUESTS
from ...protocol.reading.mode import Mode
from ...protocol.store import Store
from ..options import option_flags
from ..present.console import json_option, print_json, read_settings, url_option
from .ledger import Ledger
from .lines import Source, check, pages, refuse_bad
from .models import served_models
from .progress import ProgressScreen, duration
from .run import BatchRun
from .tally import Tally

EPILOG = """\b
Examples:
  perdure batch check in.jsonl
  perdure batch run in.jsonl -o out.jsonl -e errors.jsonl --queue gpu
  zcat in.jsonl.gz | perdure batch run - -o out.jsonl --priority low"""


@click.group(epilog=EPILOG)
def batch() -> None:
    """Answer the lines of a file, in OpenAI's batch format."""


@batch.command(name="check", epilog="\b\nExamples:\n  perdure batch check in.jsonl")
@click.argument("source", metavar="IN.JSONL")
@json_option
def check_(source: str, as_json: bool) -> None:
    """Check a file as "run" does, without a pool and without running anything.

    IN.JSONL may be - for stdin.
    """
    with Source(source, Path()) as opened:
        checked = check(opened, read_settings(), {})
    refuse_bad(checked)
    if as_json:
        print_json({"lines": checked.count})
    else:
        click.echo(f"{checked.name}: {checked.count:,} lines, all of which can be run")


@batch.command(
    epilog="""\b
Examples:
  perdure batch run in.jsonl -o out.jsonl -e errors.jsonl
  perdure batch run in.jsonl -o out.jsonl --queue gpu --priority low --in-flight 2000"""
)
@click.argument("source", metavar="IN.JSONL")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where answers go, as they come.")
@click.option("-e", "--errors", metavar="FILE", help="Where lines that fail go.  [default: OUTPUT.errors.jsonl]")
@option_flags("queue", "priority")
@click.option(
    "--in-flight",
    default=512,
    show_default=True,
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Lines that wait or run at once.",
)
@click.option("--name", default="", metavar="TEXT", help="Another name makes other requests of the same file.")
@click.option(
    "--patience",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long an outage of Redis is waited out.",
)
@click.option("--strict", is_flag=True, help="Run nothing if a line is bad; else it is a failure like any other.")
@click.option("--any-model", is_flag=True, help="Let lines name any model; what the workers have answers.")
@json_option
@url_option
def run(
    source: str,
    output: str,
    errors: str | None,
    in_flight: int,
    name: str,
    patience: float,
    strict: bool,
    any_model: bool,
    as_json: bool,
    url: str | None,
    **options: Any,
) -> int:
    """Run every line of IN.JSONL, which may be - for stdin.

    The whole file is checked first: bad lines, and those that name a model that no worker has, become failures, or
    with --strict nothing is run. Ended in whatever way, the same command goes on from where it was: what is in the
    two files is done. Exit code 1 means that some lines have failed.
    """
    settings = read_settings(url)
    queue = with_priority(check_queue(options["queue"]), options["priority"])
    answers = Path(output)
    failures = Path(errors) if errors is not None else answers.with_name(f"{answers.stem}.errors.jsonl")
    for path in (answers, failures):
        _check_place(path)
    session = Session(None, settings, None, patience)
    try:
        session.ping()
        mode: Mode = session.call(lambda store: store.mode())
        if mode.degraded:
            click.echo(str(mode), err=True)
        with Source(source, answers.parent) as opened:
            models = None if any_model else session.call(partial(served_models, queue=queue))
            checked = check(opened, settings, options, name=name, models=models)
            if strict:
                refuse_bad(checked)
            with Ledger(answers, failures, opened.stat()) as ledger, ProgressScreen() as screen:
                began = time.monotonic()
                batch_run = BatchRun(
                    session, opened, checked, ledger, screen, in_flight=in_flight, patience=patience, options=options
                )
                try:
                    tally = batch_run.go()
                except KeyboardInterrupt:
                    screen.say(_interrupted(batch_run.tally))
                    raise
    finally:
        session.close()
    seconds = time.monotonic() - began
    if as_json:
        print_json({"output": output, "errors": str(failures), **tally.summary(seconds)})
    else:
        click.echo(_report(tally, seconds, answers, failures))
    return 1 if tally.failures else 0


@batch.command(
    epilog="\b\nExamples:\n  perdure batch cancel in.jsonl\n  perdure batch cancel in.jsonl --name second --json"
)
@click.argument("source", metavar="IN.JSONL")
@click.option("--name", default="", metavar="TEXT", help="As it was given to run.")
@json_option
@url_option
def cancel(source: str, name: str, as_json: bool, url: str | None) -> None:
    """Cancel what "run" has submitted and what has not ended, after Ctrl-C say.

    The two files stay as they are. When the file is run again, its canceled lines are failures.
    """
    settings = read_settings(url)
    counts: Counter[str] = Counter()
    session = Session(None, settings, None, PATIENCE)
    try:
        session.ping()
        with Source(source, Path()) as opened:
            checked = check(opened, settings, {}, name=name)
            for ids in pages(checked.request_ids(opened), MAX_REQUESTS):
                requests = [(identifier, "") for identifier in ids]
                counts.update(session.call(partial(Store.cancel, requests=requests, reason="the batch was canceled")))
    finally:
        session.close()
    if as_json:
        print_json({"canceled": counts["canceled"], "requested": counts["requested"], "ended": counts["ended"]})
    else:
        click.echo(
            f"{counts['canceled']:,} canceled, {counts['requested']:,} running ones asked to stop, "
            f"{counts['ended']:,} had ended"
        )


def _check_place(path: Path) -> None:
    """Before a long check of the input; nothing is made yet."""
    if not path.parent.is_dir():
        raise UsageError(f"cannot write to {path}: there is no folder {path.parent}")


def _interrupted(tally: Tally) -> str:
    return (
        f"Interrupted: {tally.ended:,} of {tally.lines:,} lines are done and on disk; "
        f"{tally.in_flight:,} requests go on in "
        "the pool. The same command goes on from here."
    )


def _report(tally: Tally, seconds: float, answers: Path, failures: Path) -> str:
    text = f"{tally.kept + tally.answered:,} of {tally.lines:,} lines answered in {answers}"
    if tally.failures:
        text += f", {tally.failures:,} failed: {failures}"
    if earlier := tally.kept + tally.failed_before:
        text += f"; {earlier:,} of them by earlier runs"
    parts = [duration(seconds)]
    if tally.tokens and seconds > 0:
        parts.append(f"{tally.tokens:,} tokens, {tally.tokens / seconds:,.0f} tokens/s")
    parts.append(f"{tally.resumes:,} {'resume' if tally.resumes == 1 else 'resumes'}")
    return f"{text} ({', '.join(parts)})"
