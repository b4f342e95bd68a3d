"""What an operator asks about failures: which there are, and which are one and the same error.

Reads only, in pages. Errors of redis-py come out as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..codec import unpack_exception
from ..keys import key
from ..store import Store
from .inspection import ask, text_of

_STEP: Final = 500


@dataclass(slots=True, kw_only=True)
class DeadLetters:
    """Failures with one error: what failed in the same task, of one kind, for the same reason but for its numbers."""

    fingerprint: str
    task: str
    kind: str
    reason: str
    number: int = 0
    first: str = ""
    last: str = ""
    queues: set[str]
    sample: str = ""
    """The id of the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One failed request or plain job; ``kind`` is empty for what RQ itself failed."""

    id: str
    queue: str
    task: str
    kind: str
    reason: str
    ended_at: str
    fingerprint: str


_CHANGING = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-fA-F]{8,}(?:-[0-9a-fA-F]{4,})*\b|\d+(?:\.\d+)?|'[^']*'|\"[^\"]*\"")


def fingerprint_of(task: str, kind: str, reason: str) -> str:
    """Ten digits that failures have in common which differ in numbers, addresses, ids and quoted words only."""
    plain = _CHANGING.sub("#", reason)
    return hashlib.sha256("\0".join((task, kind, plain)).encode(errors="replace")).hexdigest()[:10]


def dead_letters(store: Store, names: Sequence[str], *, limit: int) -> Iterator[DeadLetter]:
    """The failures of these queues, the newest of each queue first, at most ``limit`` of each queue."""
    for name in names:
        for begin in range(0, limit, _STEP):
            page: Any = store.connection.zrevrange(key("failed", name), begin, min(begin + _STEP, limit) - 1)
            identifiers = [raw.decode(errors="replace") for raw in page]
            yield from _letters(store, name, identifiers)
            if len(page) < _STEP:
                break


def _letters(store: Store, queue: str, identifiers: Sequence[str]) -> Iterator[DeadLetter]:
    fields = ("task", "error_kind", "error_reason", "ended_at", "description", "last")
    rows = ask(store.connection, [("HMGET", key("job", name), *fields) for name in identifiers])
    # What RQ failed has no reason in its hash, but a traceback in its results.
    silent = [
        name
        for name, row in zip(identifiers, rows, strict=True)
        if not row[1] or not text_of(row[5]).endswith(":failed")
    ]
    said = ask(store.connection, [("XREVRANGE", key("results", name), "+", "-", "COUNT", 1) for name in silent])
    reasons = {name: _last_line(entries) for name, entries in zip(silent, said, strict=True)}
    for name, row in zip(identifiers, rows, strict=True):
        task, kind, reason, ended, description, _ = map(text_of, row)
        if name in reasons:
            kind, reason = "", reasons[name]
        task = task or description.partition("(")[0]
        yield DeadLetter(
            id=name,
            queue=queue,
            task=task,
            kind=kind,
            reason=reason,
            ended_at=ended,
            fingerprint=fingerprint_of(task, kind, reason),
        )


def _last_line(entries: Any) -> str:
    for _, fields in entries or []:
        raw = dict(zip(fields[::2], fields[1::2], strict=False)) if isinstance(fields, list) else fields
        try:
            lines = unpack_exception(raw.get(b"exc_string", b"")).strip().splitlines()
        except ValueError:
            continue
        if lines:
            return lines[-1]
    return "no reason was stored"


def grouped(letters: Iterator[DeadLetter]) -> list[DeadLetters]:
    """Groups of one fingerprint each, the largest first."""
    groups: dict[str, DeadLetters] = {}
    for letter in letters:
        group = groups.setdefault(
            letter.fingerprint,
            DeadLetters(
                fingerprint=letter.fingerprint,
                task=letter.task,
                kind=letter.kind,
                reason=letter.reason,
                queues=set(),
                first=letter.ended_at,
                sample=letter.id,
            ),
        )
        group.number += 1
        group.queues.add(letter.queue)
        if letter.ended_at >= group.last:
            group.last, group.sample, group.reason = letter.ended_at, letter.id, letter.reason
        group.first = min(group.first, letter.ended_at)
    return sorted(groups.values(), key=lambda group: (-group.number, group.fingerprint))
