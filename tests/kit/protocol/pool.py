"""What the tests of the protocol share: a pool of pretended workers over a real store.

No test waits: what time would do is done to the keys (:meth:`Pool.stop_heart`, :meth:`Pool.make_due`, ...).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis

from perdure.protocol.codec import pack, pack_result
from perdure.protocol.keys import key
from perdure.protocol.packed_state import PackedState
from perdure.protocol.records import FailureKind, NewRequest
from perdure.protocol.settings import Settings
from perdure.protocol.states import State
from perdure.protocol.store import Store
from perdure.protocol.transitions.calls import Chunk, Claim, Claims, Failure, Finish, Progress, Reaped, Sweep
from perdure.recovery.failures import POLICIES

TASK = "app.tasks.count"
OTHER = "app.tasks.other"
HOUR_MS = 3_600_000


def packed(value: Any) -> bytes:
    """A value as it is stored."""
    return pack(value, limit=1 << 20, what="output")


def plain(raw: Any) -> Any:
    """Bytes as text, as deep as they go."""
    if isinstance(raw, bytes):
        return raw.decode(errors="backslashreplace")
    if isinstance(raw, dict):
        return {plain(name): plain(value) for name, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [plain(item) for item in raw]
    if isinstance(raw, set):
        return sorted(plain(item) for item in raw)
    return raw


def dump(connection: redis.Redis, *, without: Sequence[str] = ("counters",)) -> dict[str, Any]:
    """Every key with its value, except the named ones (a name of the key table; by default the counters)."""
    readers: dict[str, Callable[[str], Any]] = {
        "hash": lambda name: connection.hgetall(name),
        "list": lambda name: connection.lrange(name, 0, -1),
        "set": lambda name: connection.smembers(name),
        "zset": lambda name: connection.zrange(name, 0, -1, withscores=True),
        "stream": lambda name: connection.xrange(name),
        "string": lambda name: connection.get(name),
    }
    skipped = tuple(key(name) for name in without)
    found: Any = connection.scan_iter(count=1000)
    names = sorted(plain(name) for name in found)
    return {
        name: plain(readers[plain(connection.type(name))](name))
        for name in names
        if not any(name == stem or (stem.endswith(":") and name.startswith(stem)) for stem in skipped)
    }


@dataclass
class Pool:
    """Pretended producers, workers and reapers; every move is a script of the real store."""

    store: Store

    @classmethod
    def over(cls, connection: redis.Redis, **settings: Any) -> Pool:
        return cls(Store(connection, Settings(**settings)))

    @property
    def connection(self) -> redis.Redis:
        return self.store.connection

    # --- producers -----------------------------------------------------------------------------------

    def new(self, identifier: str, *, queue: str = "gpu", task: str = TASK, retries: int = 3) -> NewRequest:
        return NewRequest(
            id=identifier,
            nonce=f"nonce-{identifier}",
            queue=queue,
            task=task,
            payload=packed({"n": identifier}),
            max_retries=retries,
            result_ttl=1000,
            failure_ttl=2000,
            description=f"{task}({identifier})",
        )

    def submit(self, *identifiers: str, queue: str = "gpu", task: str = TASK, retries: int = 3) -> None:
        requests = [self.new(identifier, queue=queue, task=task, retries=retries) for identifier in identifiers]
        assert self.store.enqueue(requests, client="me") == ["accepted"] * len(requests)

    def cancel(self, identifier: str) -> str:
        return self.store.cancel([(identifier, "")], reason="asked")[0]

    # --- what a test looks at ------------------------------------------------------------------------

    def status(self, identifier: str) -> State:
        record = self.store.fetch(identifier)
        assert record is not None, f"{identifier} is gone"
        return record.status

    def field(self, identifier: str, name: str) -> str:
        value: Any = self.connection.hget(key("job", identifier), name)
        return "" if value is None else str(value.decode())

    def waiting(self, queue: str = "gpu") -> list[str]:
        """The queue's ids, first served first."""
        result: list[str] = plain(self.connection.lrange(key("queue", queue), 0, -1))
        return result

    def events(self, identifier: str) -> list[str]:
        return [event.event for event in self.store.history(identifier)]

    def suspects(self, queue: str = "gpu") -> list[str]:
        """Ids of the waiting suspects, first served first."""
        result: list[str] = plain(self.connection.zrange(key("suspects", queue), 0, -1))
        return result

    def due_in(self, identifier: str, queue: str = "gpu") -> float:
        """Seconds that a retry is to wait, from the moment in which it was put aside, however late a test asks."""
        score: Any = self.connection.zscore(key("retries", queue), identifier)
        assert score is not None, f"{identifier} waits for no retry"
        return (float(score) - float(self.field(identifier, "aside_at"))) / 1000

    def now(self) -> float:
        reply: Any = self.connection.time()
        return float(reply[0] + reply[1] / 1e6)

    # --- what time would do --------------------------------------------------------------------------

    def let_pass(self, seconds: float) -> None:
        """Every pulse, heartbeat, lease, retry and checkpoint becomes older by so much; executions too."""
        shift = round(seconds * 1000)
        self.set_pulse(at_shift=0, since_shift=-shift)
        for name in (key("beats"), key("leases", "gpu"), key("retries", "gpu"), key("checkpoints")):
            found: Any = self.connection.zrange(name, 0, -1)
            for member in found:
                self.connection.zincrby(name, -shift, member)
        for stem, field in (("checkpoint", "at"), ("job", "claimed")):
            holders: Any = self.connection.scan_iter(match=f"{key(stem)}*", count=1000)
            for name in holders:
                if self.connection.type(name) == b"hash" and self.connection.hexists(name, field):
                    self.connection.hincrby(name, field, -shift)

    def set_pulse(self, *, at_shift: int = 0, since_shift: int = -HOUR_MS) -> None:
        """The reapers' pulse as if sweeps had gone on: the last one ``at_shift`` ms from now."""
        now = int(self.now() * 1000)  # rounded up, it would come from the future
        self.connection.hset(key("pulse"), mapping={"at": now + at_shift, "since": now + since_shift})

    def stop_heart(self, incarnation: str) -> None:
        """The incarnation's last heartbeat becomes too old."""
        self.connection.zadd(key("beats"), {incarnation: 1})

    def expire_lease(self, identifier: str, queue: str = "gpu") -> None:
        self.connection.zadd(key("leases", queue), {identifier: 1}, xx=True)

    def make_due(self, identifier: str, queue: str = "gpu") -> None:
        """The wait of a retry is over."""
        self.connection.zadd(key("retries", queue), {identifier: 1}, xx=True)
        self.connection.zadd(key("aside"), {queue: 1})

    def age_checkpoint(self, identifier: str, seconds: float) -> None:
        at = round((self.now() - seconds) * 1000)
        self.connection.hset(key("checkpoint", identifier), "at", at)
        self.connection.zadd(key("checkpoints"), {identifier: at})

    # --- reapers -------------------------------------------------------------------------------------

    def sweep(self, *queues: str, settled: bool = True) -> Sweep:
        """One sweep; ``settled`` pretends that sweeps have gone on for an hour."""
        if settled:
            self.set_pulse()
        return self.store.reap(queues or ("gpu",), kind="WORKER_LOST", reason="no heartbeat")

    def reap(
        self, incarnation: str, kind: FailureKind = FailureKind.WORKER_LOST, *, seen: bool = False
    ) -> list[Reaped]:
        """What a guardian does with evidence; with ``seen``, also when it has none."""
        policy = POLICIES[kind]
        return self.store.reap(
            incarnation=incarnation,
            kind=kind,
            reason="seen",
            charge=policy.charge,
            crash=policy.crash,
            loss=policy.loss,
            seen=seen,
        ).reaped


class Hand:
    """One pretended worker process."""

    def __init__(self, pool: Pool, name: str = "w1", queues: Sequence[str] = ("gpu",), slots: int = 4) -> None:
        self.pool = pool
        self.store = pool.store
        self.name = name
        self.queues = list(queues)
        self.slots = slots
        self.incarnation = f"{name}-{uuid.uuid4().hex[:8]}"
        self.held: dict[str, Claim] = {}

    def beat(self, fingerprints: Sequence[str] = (), *, ready: bool | str = True) -> str:
        return self.store.heartbeat(
            incarnation=self.incarnation,
            worker=self.name,
            queues=self.queues,
            pid=4711,
            host="here",
            ready=ready,
            fingerprints=fingerprints,
        ).status

    def claim(self, free: int | None = None, *, forget: bool = False, resume: bool = True) -> Claims:
        """Claim into the free slots; ``forget`` claims as if earlier replies had been lost."""
        if forget:
            self.held.clear()
        task = next((claim.task for claim in self.held.values()), "")
        slots = self.slots - len(self.held) if free is None else free
        claims = self.store.claim(
            incarnation=self.incarnation,
            worker=self.name,
            queues=self.queues,
            task=task,
            free=slots,
            slots={TASK: slots, OTHER: slots},
            known=list(self.held),
            resume=resume,
        )
        self.held |= {claim.id: claim for claim in claims.claims}
        return claims

    def take(self, identifier: str) -> Claim:
        """Claim one request and make sure that it is this one."""
        claims = self.claim(1).claims
        assert [claim.id for claim in claims] == [identifier]
        return claims[0]

    def step(
        self,
        claim: Claim,
        outputs: Sequence[Any],
        *,
        offset: int | None = None,
        seq: int | None = None,
        stepped: float = 0.0,
    ) -> str:
        """Store outputs and a state, ``stepped`` seconds after it began; by default where this execution began."""
        start = claim.offset if offset is None else offset
        item = self.progress(claim, outputs, start, seq or claim.seq + 1, stepped)
        return self.store.progress(self.incarnation, [item])[0]

    def write(
        self, claim: Claim, state: PackedState, *, seq: int | None = None, numbers: Sequence[int] = ()
    ) -> list[str]:
        """Write the chunks of a large state, or those of the given numbers."""
        pieces = state.stored.pieces
        return self.store.write_chunks(
            [
                Chunk(
                    id=claim.id,
                    execution=claim.execution,
                    seq=seq or claim.seq + 1,
                    total=len(pieces),
                    number=number,
                    data=pieces[number - 1],
                )
                for number in numbers or range(1, len(pieces) + 1)
            ]
        )

    def commit(
        self,
        claim: Claim,
        state: PackedState,
        outputs: Sequence[Any] = (),
        *,
        offset: int | None = None,
        seq: int | None = None,
    ) -> str:
        """Make a large state, whose chunks were written, the checkpoint's."""
        start = claim.offset if offset is None else offset
        row = replace(self.progress(claim, outputs, start, seq or claim.seq + 1), state=state)
        return self.store.progress(self.incarnation, [row])[0]

    def progress(self, claim: Claim, outputs: Sequence[Any], offset: int, seq: int, stepped: float = 0.0) -> Progress:
        return Progress(
            id=claim.id,
            execution=claim.execution,
            seq=seq,
            offset=offset,
            outputs=len(outputs),
            blob=packed([claim.epoch, offset, list(outputs)]) if outputs else b"",
            state=packed({"upto": offset + len(outputs)}),
            fingerprint="model-1",
            stepped=stepped,
        )

    def finish(self, claim: Claim, value: Any = None, *, offset: int = 0, outputs: Sequence[Any] = ()) -> str:
        self.held.pop(claim.id, None)
        item = Finish(
            id=claim.id,
            execution=claim.execution,
            offset=offset,
            outputs=len(outputs),
            blob=packed([claim.epoch, offset, list(outputs)]) if outputs else b"",
            result=pack_result(value, limit=1 << 20),
            seconds=0.5,
        )
        return self.store.finish(self.incarnation, self.name, [item])[0]

    def fail(self, claim: Claim, kind: FailureKind = FailureKind.UNKNOWN, reason: str = "it broke") -> str:
        self.held.pop(claim.id, None)
        policy = POLICIES[kind]
        item = Failure(
            id=claim.id,
            execution=claim.execution,
            kind=kind,
            reason=reason,
            traceback=f"Traceback\n{reason}",
            charge=policy.charge,
            crash=policy.crash,
            loss=policy.loss,
            retry=policy.retry,
        )
        return self.store.fail(self.incarnation, self.name, [item])[0]

    def release(self, *claims: Claim, delay: float = 0.0, fingerprints: Sequence[str] = ()) -> list[str]:
        for claim in claims:
            self.held.pop(claim.id, None)
        pairs = [(claim.id, claim.execution) for claim in claims]
        return self.store.release(
            self.incarnation, self.name, pairs, reason="draining", delay=delay, fingerprints=fingerprints
        )

    def confirm_cancel(self, claim: Claim) -> str:
        self.held.pop(claim.id, None)
        pairs = [(claim.id, claim.execution)]
        return self.store.cancel(pairs, reason="asked", incarnation=self.incarnation, worker=self.name)[0]

    def renew(self, claim: Claim) -> str:
        return self.store.renew(self.incarnation, [(claim.id, claim.execution)])[0]

    def settle(self, claim: Claim, pipeline: Any) -> None:
        """Queue the end of a plain job's holding, as RQ's own code does at the job's end."""
        self.held.pop(claim.id, None)
        self.store.settle(pipeline, self.incarnation, claim.queue, claim.id, claim.execution)
