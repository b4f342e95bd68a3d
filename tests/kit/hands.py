"""The worker's side, played by tests themselves with the calls that a worker makes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import redis

from perdure.protocol.codec import pack, pack_entry, pack_result
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.protocol.transitions.calls import Claim, Failure, Finish, Progress

PATH = "app.tasks.count"
LONG = 60.0
"""Seconds; reached only when something is broken."""


class Hands:
    """A worker without a process: claims, writes and ends as it is told."""

    def __init__(self, connection: redis.Redis) -> None:
        self.store = Store(connection, Settings())
        self.seq: Counter[str] = Counter()
        self.held: set[str] = set()

    def claim(self, *, resume: bool = True, number: int = 1) -> list[Claim]:
        claims = self.store.claim(
            incarnation="hands",
            worker="hands",
            queues=["default"],
            task="",
            free=number,
            slots={},
            known=self.held,
            resume=resume,
        ).claims
        self.held.update(claim.id for claim in claims)
        return claims

    def one(self) -> Claim:
        (claim,) = self.claim()
        return claim

    def put(self, claim: Claim, offset: int, *outputs: Any, state: bytes | None = None, old: bool = False) -> None:
        """``old``: as a release did that knew of no tokens."""
        row = self._row(claim, offset, outputs, state)
        if old:
            row = replace(row, blob=pack([claim.epoch, offset, outputs], limit=10**6, what="output"))
        assert self.store.progress("hands", [row])[0] in ("ok", "heard")

    def put_all(self, claims: Sequence[Claim]) -> None:
        """The first output of each, its id, in one call."""
        rows = [self._row(claim, 0, [claim.id]) for claim in claims]
        assert set(self.store.progress("hands", rows)) <= {"ok", "heard"}

    def _row(self, claim: Claim, offset: int, outputs: Sequence[Any], state: bytes | None = None) -> Progress:
        self.seq[claim.execution] = max(self.seq[claim.execution], claim.seq) + 1
        return Progress(
            id=claim.id,
            execution=claim.execution,
            seq=self.seq[claim.execution],
            offset=offset,
            outputs=len(outputs),
            blob=pack_entry(claim.epoch, offset, outputs),
            state=state,
            fingerprint="",
            tell=True,
        )

    def finish(self, claim: Claim, offset: int, result: Any = None) -> None:
        end = Finish(
            id=claim.id,
            execution=claim.execution,
            offset=offset,
            outputs=0,
            blob=b"",
            result=pack_result(result, limit=10**6),
            seconds=0.1,
        )
        assert self.store.finish("hands", "hands", [end]) == ["ok"]

    def fail(self, claim: Claim, kind: FailureKind, reason: str) -> None:
        failure = Failure(
            id=claim.id,
            execution=claim.execution,
            kind=kind,
            reason=reason,
            traceback="Trace",
            charge=True,
            crash=False,
            loss=False,
            retry=False,
        )
        assert self.store.fail("hands", "hands", [failure]) == ["failed"]

    def restart(self, claim: Claim) -> Claim:
        """Hand it back and take it again from zero, as after a checkpoint that grew too old."""
        self.store.release("hands", "hands", [(claim.id, claim.execution)], reason="test")
        self.held.clear()
        (again,) = self.claim(resume=False)
        assert (again.id, again.epoch) == (claim.id, claim.epoch + 1)
        return again


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that something else brings about."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def subscribers(connection: redis.Redis) -> list[dict[str, str]]:
    clients: Any = connection.client_list()
    return [item for item in clients if item["name"] == "perdure-client" and item["sub"] != "0"]


def subscribed_anew(connection: redis.Redis, address: str) -> bool:
    """Whether there is a subscriber, and not the one with this address."""
    return [item["addr"] for item in subscribers(connection)] not in ([], [address])
