"""Requests that no worker of their queue can load the task of: they end, with that reason, within a bounded time.

A worker that cannot load a task says so with each heartbeat, and leaves its requests to others. When every living
worker that serves a queue has said so for long enough, nobody is left to wait for. The clock starts anew when a worker
joins or loads the task, and does not run while there is no worker at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.keys import all_served
from ..protocol.reading.words import WorkerWord, sentence, serving
from ..protocol.records import FailureKind

MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Unserved:
    """A task that nobody who serves a queue can load, for ``seconds`` by now; ``due`` if its requests are to end."""

    queue: str
    task: str
    kind: FailureKind
    reason: str
    workers: tuple[str, ...]
    seconds: float
    due: bool


def unserved(words: Sequence[WorkerWord], now: float, *, missing: float, broken: float) -> list[Unserved]:
    """What follows from what all living workers say; ``now`` and their dates in seconds since 1970 by the server's
    clock.

    ``missing``, ``broken``: seconds after which requests end whose module or task is not there, and whose task cannot
    be loaded for another reason. It is the longer one as long as one worker has the module.
    """
    result = []
    for queue in sorted(all_served(plain for word in words for plain in word.queues)):
        theirs = serving(words, queue)
        for task in sorted({item.task for word in theirs for item in word.unable}):
            said = [item for word in theirs for item in word.unable if item.task == task]
            if len(said) < len(theirs):
                continue
            since = max(max(item.since for item in said), max(word.joined for word in theirs))
            all_missing = all(item.kind == MISSING for item in said)
            limit = missing if all_missing else broken
            # The word of one that has the module says more.
            chosen = next((item for item in said if item.kind != MISSING), said[0])
            result.append(
                Unserved(
                    queue,
                    task,
                    FailureKind.INVALID_REQUEST if all_missing else FailureKind.ERROR,
                    sentence(queue, task, chosen, len(theirs)),
                    tuple(word.incarnation for word in theirs),
                    now - since,
                    now - since >= limit,
                )
            )
    return result
