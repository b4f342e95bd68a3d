"""What workers say of the tasks that they cannot load, and what that means for whoever waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import redis

from ..keys import all_served, key, unlisted
from ..records import whole


@dataclass(frozen=True, slots=True)
class Inability:
    """A task that a worker could not load: ``missing`` (its module, or it in its module) or ``broken``; ``since`` when,
    in seconds since 1970 by the server's clock.
    """

    task: str
    kind: str
    since: float
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerWord:
    """What a living worker says of itself: what it serves, since when (seconds since 1970), and what it cannot load."""

    incarnation: str
    worker: str
    queues: list[str]
    spare: bool
    joined: float
    unable: list[Inability]

    @staticmethod
    def inabilities(text: str) -> list[Inability]:
        """Of the field ``unable`` of a worker's record: a line each, with tabs between task, kind, ms and reason."""
        rows = [line.split("\t", 3) for line in text.splitlines()]
        return [Inability(row[0], row[1], whole(row[2]) / 1000, row[3]) for row in rows if len(row) == 4]


def read_words(connection: redis.Redis) -> tuple[list[WorkerWord], float]:
    """What all living workers say of what they cannot load, and the server's time; no words if none has any trouble."""
    seconds, micros = connection.time()
    now = seconds + micros / 1e6
    if not connection.zcount(key("unable"), f"({now * 1000:.0f}", "+inf"):
        return [], now
    beats: Any = connection.zrangebyscore(key("beats"), f"({now * 1000:.0f}", "+inf")
    names = [raw.decode(errors="replace") for raw in beats]
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hmget(key("incarnation", name), "worker", "queues", "ready", "started", "unable")
        rows = pipe.execute()
    texts = [[(value or b"").decode(errors="replace") for value in row] for row in rows]
    return [
        WorkerWord(
            name,
            worker,
            unlisted(queues),
            ready in ("spare", "leaving"),
            whole(started) / 1000,
            WorkerWord.inabilities(unable),
        )
        for name, (worker, queues, ready, started, unable) in zip(names, texts, strict=True)
    ], now


def sentence(queue: str, task: str, item: Inability, workers: int) -> str:
    """Why nobody runs it, in one line for people."""
    if workers == 1:
        return f"the only worker of queue {queue} could not load {task}: {item.reason}"
    return f"none of the {workers} workers of queue {queue} could load {task}: {item.reason}"


def serving(words: Iterable[WorkerWord], queue: str) -> list[WorkerWord]:
    """Those that serve a queue, by its name or as a priority of another one; not those that stand by as spares."""
    return [word for word in words if not word.spare and queue in all_served(word.queues)]


def trouble(words: Iterable[WorkerWord], queue: str, task: str) -> str:
    """What workers that serve a queue say of a task. Empty if none of them has trouble with it."""
    theirs = serving(words, queue)
    said = [item for word in theirs for item in word.unable if item.task == task]
    if not said:
        return ""
    if len(said) == len(theirs):
        return sentence(queue, task, said[0], len(theirs))
    return f"{len(said)} of {len(theirs)} workers of queue {queue} could not load {task}: {said[0].reason}"
