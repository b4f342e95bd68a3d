"""What a run leaves behind: the producers' journals, and what Redis holds of each request. Gathered, not judged."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from ...protocol.codec import unpack, unpack_entry, unpack_result
from ...protocol.keys import PREFIX, key
from ...protocol.records import Event
from . import journal
from .load import STEPS, TEXTS
from .stage import Fired

BATCH: Final = 200
"""Requests that are read in one round trip."""

QUEUES: Final = tuple(f"{queue}{suffix}" for queue in (STEPS, TEXTS) for suffix in ("", "-high", "-low"))

HELD: Final = (
    "leases", "retries", "deadlines", "held", "checkpoint", "checkpoints", "wip", "execution", "executions", "queue",
)  # fmt: skip
"""Keys that exist only while a request waits or runs."""

PERMANENT: Final = (
    "queues", "workers", "workers_of", "finished", "failed", "canceled", "beats", "counters", "pulse", "schema",
    "fingerprints", "aside",
)  # fmt: skip
"""Keys of the pool itself, and RQ's, that never expire."""


@dataclass(slots=True)
class Seen:
    """One request as its producers saw it: outputs as (monotonic seconds, index, output), ends as in journals."""

    id: str
    task: str
    payload: dict[str, Any]
    at: float = 0.0
    """When its producer was told that it is stored, or else began to submit it (monotonic s). Until then the id may be
    another request's.
    """
    accepted: bool = False
    outputs: list[tuple[float, int, Any]] = field(default_factory=list)
    ends: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class StoredRequest:
    """One request as Redis has it; ``entries`` are the types in RQ's result stream, one for each end."""

    status: str
    execution: str
    attempt: int
    last: str
    kind: str
    reason: str
    entries: list[str]
    registries: list[str]
    outputs: list[Any]
    result: Any
    history: list[Event]


@dataclass(slots=True)
class Sample:
    """A checkpoint as it stood at some moment; ``state`` is ``None`` if the task stores none."""

    id: str
    epoch: int
    seq: int
    offset: int
    state: Any
    at: float = float("inf")
    """When it was read, in monotonic seconds."""


@dataclass(slots=True)
class Evidence:
    """Everything that the judge is given."""

    seen: dict[str, Seen] = field(default_factory=dict)
    stored: dict[str, StoredRequest] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    """Requests in Redis that nobody meant to submit."""
    leaks: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    fired: list[Fired] = field(default_factory=list)
    enabled: list[str] = field(default_factory=list)
    words: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    """Payloads of text generation, each with the answer that nothing has disturbed."""
    broken: list[str] = field(default_factory=list)
    """Producers that ended by themselves."""
    began: float = 0.0
    ended: float = 0.0


def read_journals(paths: Iterable[Path]) -> dict[str, Seen]:
    """All requests of all producers. A producer's ninth life reads on what its eighth submitted, the tenth after it."""
    seen: dict[str, Seen] = {}
    for path in sorted(paths, key=_life):
        for line in journal.read(path):
            name, what = line["id"], line["what"]
            if what == journal.INTENT:
                seen[name] = Seen(name, line["task"], line["payload"], line["at"])
            elif what == journal.ACCEPTED:
                seen[name].accepted, seen[name].at = True, line["at"]
            elif what == journal.WITHDRAWN:
                seen[name].accepted = False
            elif what == journal.OUTPUT:
                seen[name].outputs.append((line["at"], line["index"], line["output"]))
            elif what == journal.END:
                seen[name].ends.append(line)
    return seen


def _life(path: Path) -> tuple[str, int]:
    """Producer and number of its life, of a name such as ``p1.10.jsonl``."""
    producer, life, _ = path.name.split(".")
    return producer, int(life)


def read_requests(connection: redis.Redis, names: Sequence[str]) -> dict[str, StoredRequest]:
    """What Redis holds of these requests; those that it does not have are left out."""
    registries = _registries(connection)
    stored: dict[str, StoredRequest] = {}
    fields = ("status", "execution", "attempt", "last", "error_kind", "error_reason")
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        with connection.pipeline(transaction=False) as pipe:
            for name in part:
                pipe.hmget(key("job", name), fields)
                pipe.xrange(key("results", name))
                pipe.lrange(key("output", name), 0, -1)
                pipe.lrange(key("history", name), 0, -1)
            replies = pipe.execute()
        for number, name in enumerate(part):
            job, ends, log, history = replies[4 * number : 4 * number + 4]
            if job[0] is None:
                continue
            status, execution, attempt, last, kind, reason = [(value or b"").decode(errors="replace") for value in job]
            values = [item[b"return_value"] for _, item in ends if b"return_value" in item]
            stored[name] = StoredRequest(
                status=status,
                execution=execution,
                attempt=int(attempt or 0),
                last=last,
                kind=kind,
                reason=reason,
                entries=[item[b"type"].decode() for _, item in ends],
                registries=registries[name],
                outputs=_outputs(log),
                result=unpack_result(values[-1]) if values else None,
                history=[Event.parse(line) for line in history],
            )
    return stored


def read_samples(connection: redis.Redis, number: int) -> list[Sample]:
    """Checkpoints of the requests that were stored last."""
    now = time.monotonic()
    names: Any = connection.zrevrange(key("checkpoints"), 0, number - 1)
    with connection.pipeline(transaction=True) as pipe:
        for name in names:
            pipe.hmget(key("checkpoint", name.decode()), "seq", "offset", "state")
            pipe.hget(key("job", name.decode()), "epoch")
        replies = pipe.execute()
    samples = []
    for place, name in enumerate(names):
        (seq, offset, state), epoch = replies[2 * place : 2 * place + 2]
        if seq is not None:
            value = unpack(state) if state is not None else None
            samples.append(Sample(name.decode(), int(epoch or 0), int(seq), int(offset), value, now))
    return samples


def strangers_and_leaks(connection: redis.Redis, known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Below our own prefix: requests that are not among the known, and keys that should not be left at the end."""
    mine, stem = set(known), key("job")
    held = tuple(key(name) for name in HELD)
    permanent = tuple(key(name) for name in PERMANENT)
    strangers, leaks = [], []
    kept = _kept(connection)
    names = [name.decode(errors="replace") for name in connection.scan_iter(match=f"{PREFIX}:*", count=1000)]
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        with connection.pipeline(transaction=False) as pipe:
            for name in part:
                pipe.ttl(name)
            times = pipe.execute()
        for name, left in zip(part, times, strict=True):
            if name.startswith(stem) and ":" not in name[len(stem) :] and name[len(stem) :] not in mine:
                strangers.append(name[len(stem) :])
            if name in kept and (left > 0 or name == key("checkpoints")):
                continue
            if name.startswith(held):
                leaks.append(name)
            elif left == -1 and not name.startswith(permanent):
                leaks.append(f"{name} (without TTL)")
    return sorted(strangers), sorted(leaks)


def _kept(connection: redis.Redis) -> set[str]:
    """The checkpoints of dead letters, and their index if it has no others: a requeue goes on from there."""
    dead = {name for name, kinds in _registries(connection).items() if "failed" in kinds}
    indexed: Any = connection.zrange(key("checkpoints"), 0, -1)
    kept = {key("checkpoint", name) for name in dead}
    return kept | {key("checkpoints")} if {name.decode() for name in indexed} <= dead else kept


def delete_all(connection: redis.Redis) -> None:
    """Everything below our own prefix, on a server that is not ours."""
    for name in connection.scan_iter(match=f"{PREFIX}:*", count=1000):
        connection.unlink(name)


def _registries(connection: redis.Redis) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for kind in ("finished", "failed", "canceled"):
        for queue in QUEUES:
            members: Any = connection.zrange(key(kind, queue), 0, -1)
            for member in members:
                found[member.decode()].append(kind)
    return found


def _outputs(log: Sequence[bytes]) -> list[Any]:
    """The outputs of the newest epoch, every entry as it stands: one that was stored twice shows twice."""
    entries = [unpack_entry(item) for item in log]
    newest = max((epoch for epoch, _, _ in entries), default=0)
    return [output for epoch, _, outputs in entries if epoch == newest for output in outputs]
