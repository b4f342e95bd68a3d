"""``perdure dead-letters``: failures grouped by error, and the way back. Also ``python
scripts/inspect_dead_letters.py``.
"""

from __future__ import annotations

from typing import Any

import click

from perdure.protocol.queries.dead_letters import DeadLetter, DeadLetters, grouped
from perdure.protocol.queries.dead_letters import dead_letters as read_dead_letters
from perdure.scripts.cli.moves import requeue_one
from perdure.scripts.main import USAGE, run_file
from perdure.scripts.present.console import json_option, one_line, print_json, print_table, url_option
from perdure.scripts.present.reading import chosen_queues, open_store


@click.command(
    name="dead-letters",
    epilog="\b\nExamples:\n  perdure dead-letters\n  perdure dead-letters --kind GPU_OOM --ids\n"
    "  perdure dead-letters --error 3fa94c01d2 --requeue --yes",
)
@click.option("--queue", metavar="NAME", help="Only this queue, with its priorities.")
@click.option(
    "--kind", metavar="KIND", help="Only this kind, such as GPU_OOM; RQ stands for failures of plain RQ jobs."
)
@click.option("--task", metavar="TASK", help="Only this task.")
@click.option("--error", "fingerprint", metavar="ERROR", help="Only this group.")
@click.option("--ids", is_flag=True, help="List single failures instead of groups.")
@click.option("--requeue", is_flag=True, help="Requeue all matching failures.")
@click.option("--yes", is_flag=True, help="With --requeue: requeue them; without it, only count them.")
@click.option(
    "--limit",
    default=10_000,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="How many of each queue's newest failures to read.",
)
@json_option
@url_option
def dead_letters(
    queue: str | None,
    kind: str | None,
    task: str | None,
    fingerprint: str | None,
    ids: bool,
    requeue: bool,
    yes: bool,
    limit: int,
    as_json: bool,
    url: str | None,
) -> None:
    """Group what has failed by error, the largest group first.

    Failures of a group share task, kind and reason; numbers, addresses and quoted words are ignored. --requeue does
    what "perdure requeue" does: attempts are reset, and a checkpoint younger than an hour is resumed.
    """
    if yes and not requeue:
        raise click.UsageError("--yes goes with --requeue")
    with open_store(url) as store:
        letters = [
            letter
            for letter in read_dead_letters(store, chosen_queues(store, queue), limit=limit)
            if (kind is None or (letter.kind or "RQ") == kind)
            and (task is None or letter.task == task)
            and (fingerprint is None or letter.fingerprint == fingerprint)
        ]
        if requeue and yes:
            letters = [letter for letter in letters if requeue_one(store.connection, letter.queue, letter.id)]
    if requeue:
        _tell(letters, as_json, done=yes)
    elif as_json:
        groups = [] if ids else grouped(iter(letters))
        print_json({"items": [as_letter(item) for item in letters] if ids else [as_group(group) for group in groups]})
    elif not letters:
        click.echo("Nothing has failed.", err=True)
    elif ids:
        rows = [
            [item.id, item.queue, item.kind or "RQ", item.fingerprint, item.ended_at[:19], item.reason]
            for item in letters
        ]
        print_table(("ID", "QUEUE", "KIND", "ERROR", "FAILED AT", "REASON"), rows)
    else:
        _print_groups(grouped(iter(letters)))


def _tell(letters: list[DeadLetter], as_json: bool, *, done: bool) -> None:
    if as_json:
        print_json(
            {"requeued": len(letters) if done else 0, "matching": len(letters), "ids": [item.id for item in letters]}
        )
    else:
        number = f"{len(letters)} {'failure' if len(letters) == 1 else 'failures'}"
        click.echo(f"{number} {'requeued' if done else 'would be requeued'}.")
    if letters and not done:
        click.echo("Add --yes to do it.", err=True)
        raise click.exceptions.Exit(USAGE)


def _print_groups(groups: list[DeadLetters]) -> None:
    rows = [
        [
            group.fingerprint,
            group.number,
            group.kind or "RQ",
            group.task,
            ",".join(sorted(group.queues)),
            group.last[:19],
            group.sample,
        ]
        for group in groups
    ]
    print_table(("ERROR", "NUMBER", "KIND", "TASK", "QUEUES", "LAST", "FOR EXAMPLE"), rows)
    click.echo()
    for group in groups:
        click.echo(one_line(f"{group.fingerprint}  {group.reason}"))


def as_letter(item: DeadLetter) -> dict[str, Any]:
    """A failure as ``--ids --json`` prints it."""
    return {
        "id": item.id, "queue": item.queue, "task": item.task, "kind": item.kind or None, "reason": item.reason,
        "ended_at": item.ended_at or None, "error": item.fingerprint,
    }  # fmt: skip


def as_group(group: DeadLetters) -> dict[str, Any]:
    """A group as ``--json`` prints it."""
    return {
        "error": group.fingerprint, "number": group.number, "task": group.task, "kind": group.kind or None,
        "reason": group.reason, "queues": sorted(group.queues),
        "first": group.first or None, "last": group.last or None,
        "sample": group.sample,
    }  # fmt: skip


if __name__ == "__main__":
    run_file("dead-letters")
