"""The rows of calls, made of records, and records made of the rows of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, fields
from datetime import datetime
from functools import cache, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..codec import envelope
from ..packed_state import stored
from ..records import STORED, Interruption, NewRequest, whole
from ..scripts import load

if TYPE_CHECKING:
    from .calls import Claim, Progress

STOCK_FUNCTION = "perdure.workers.envelope.wrong_worker"
"""What a stock RQ worker runs when it takes a request of ours: see that function."""

_OWN = ("id", "nonce", "payload", "digest", "degraded_payload")
"""What each request has for itself; most requests of one call have all the rest in common."""

_SHARED = {item.name: item for item in fields(NewRequest) if item.name not in _OWN}
_KIND = attrgetter(*_SHARED)


def enqueued(requests: Sequence[NewRequest]) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``enqueue``: what requests have in common goes over the wire, and through the script, once."""
    numbers: dict[Any, int] = {}
    rows = [
        {
            "id": request.id, "nonce": request.nonce, "kind": numbers.setdefault(_KIND(request), len(numbers) + 1),
            "payload": request.payload, "digest": request.digest, "degraded_payload": request.degraded_payload,
        }
        for request in requests
    ]  # fmt: skip
    kinds = [_kind_row(shared) for shared in numbers]
    return {
        "kind": [row for row, _ in kinds],
        "stored": [field for _, besides in kinds for field in besides],
        "request": rows,
    }


@lru_cache(maxsize=64)
def _kind_row(shared: tuple[Any, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a kind, and what is stored besides by its names; kept, since most submits are of few kinds."""
    sent = dict(zip(_SHARED, map(_sent, shared, _SHARED.values()), strict=True))
    ruled = [name for name in load("enqueue").header.groups["kind"] if name in sent]
    plain = [(name, sent[name]) for name, item in _SHARED.items() if name not in ruled and sent[name] != item.default]
    plain.append(("data", envelope(STOCK_FUNCTION, sent["task"])))
    besides = [{"name": name, "value": value} for field, value in plain for name in STORED[field]]
    return {name: sent[name] for name in ruled} | {"besides": len(besides)}, besides


def _sent(value: Any, item: Field[Any]) -> Any:
    """As scripts take it: seconds as whole milliseconds, rounded up."""
    if item.type == "float":
        return math.ceil(value * 1000)
    return int(value) if item.type == "bool" else value


@cache
def kept() -> tuple[str, ...]:
    """Fields of :class:`Progress` that ``progress.lua`` has no rule for: the checkpoint has them by their names."""
    from .calls import Progress  # not before: producers have no use for it, and its classes take time to make

    ruled = load("progress").header.groups["request"]
    return tuple(item.name for item in fields(Progress) if item.name not in ruled)


def progressed(requests: Sequence[Progress]) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``progress``."""
    rows, besides = [], []
    for number, item in enumerate(requests, 1):
        state = stored(item.state)
        rows.append({
            "id": item.id, "execution": item.execution, "seq": item.seq, "offset": item.offset,
            "outputs": item.outputs, "blob": item.blob, "has_state": int(item.state is not None),
            "state": b"" if state.chunks else state.pieces[0], "crc": state.crc, "chunks": state.chunks,
            "length": state.length, "stepped": round(item.stepped * 1000),
            "tell": int(item.tell and item.outputs > 0), "brief": int(item.brief),
        })  # fmt: skip
        if not item.brief:
            besides += [{"of_request": number, "name": name, "value": getattr(item, name)} for name in kept()]
    return {"kept": besides, "request": rows}


def claim_of(row: Sequence[bytes], now: float) -> Claim:
    """A claim of the fields that ``claim.lua`` returns; ``now`` in seconds since 1970 on the server's clock."""
    from .calls import Claim

    identifier, execution, queue, kind, task = (value.decode(errors="replace") for value in row[:5])
    created, *besides = row[14].split(b"\t", 3)
    enqueued, trace, interrupted = besides if len(besides) == 3 else (b"", b"", b"")
    age = _since(created, now)
    interruption = Interruption.parse(interrupted.decode(errors="replace")) if interrupted else None
    return Claim(
        id=identifier,
        execution=execution,
        queue=queue,
        plain=kind == "plain",
        task=task,
        payload=row[5],
        attempt=whole(row[6]) + 1,
        seq=whole(row[7]),
        offset=whole(row[8]),
        epoch=whole(row[9]),
        fingerprint=row[10].decode(errors="replace"),
        client=row[11].decode(errors="replace"),
        timeout=whole(row[12]),
        step_timeout=whole(row[13]) / 1000 or None,
        created=_time(created),
        age=age,
        waited=_since(enqueued, now) if enqueued else age,
        interruption=interruption,
        paused=max(0.0, now - interruption.moved) if interruption else 0.0,
        trace=trace.decode(errors="replace") if trace else "",
        heard=row[15] == b"1",
        watched=row[16] == b"1",
    )


def _time(date: bytes) -> float:
    """A date of RQ's in seconds since 1970; 0 for what is none."""
    try:
        return datetime.fromisoformat(date.decode()).timestamp()
    except (ValueError, TypeError):
        return 0.0


def _since(date: bytes, now: float) -> float:
    """Seconds since a date of RQ's; 0 for what is none."""
    time = _time(date)
    return max(0.0, now - time) if time else 0.0


def in_ms(seconds: float) -> int:
    """Whole milliseconds, at least one."""
    return max(1, round(seconds * 1000))


def as_text(reply: Any) -> Any:
    """An answer with texts where redis-py has bytes."""
    if isinstance(reply, bytes):
        return reply.decode(errors="replace")
    if isinstance(reply, list):
        return [as_text(item) for item in reply]
    return reply
