"""What may be true of requests, in plain Python: the model that the real scripts are held against.

Every call goes to the real store and is then judged: the answer must be the one that the model gives, or one of
those that it allows; afterwards :meth:`World.check` compares all of Redis with it. A call is a value, so that
any of them can be sent again, verbatim, at any later time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from rq import Queue
from rq.job import Job

from perdure.protocol.codec import unpack
from perdure.protocol.keys import key
from perdure.protocol.records import NewRequest
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.protocol.transitions.calls import Claim, Finish, Progress
from perdure.recovery.failures import POLICIES
from tests.kit.protocol.clock import Clock, Look

QUEUES = ("gpu-high", "gpu")
TOMBSTONE_MS = 3_600_000
PATIENCE_MS = 2000
"""For so long a request is left to others by a worker that has failed it."""

BLAMED = {"CRASH", "HANG", "GPU_ERROR", "GPU_OOM", "HOST_OOM", "WORKER_LOST"}


def name_of(incarnation: str) -> str:
    return incarnation.rpartition(".")[0]


@dataclass
class Expected:
    """One accepted request: what its keys must say."""

    new: NewRequest
    deadline: int
    execution: str = ""
    holder: str = ""
    lease: int = 0
    last: str = ""
    verdict: str = ""
    ended_at: int = 0
    requeued: bool = False
    """RQ has pushed it again; the claim that meets it forgets the verdict."""
    again: bool = False
    """It was enqueued once more while it runs: after its end it runs again."""
    finished: int = 0
    stray: bool = False
    """An entry of its queue's list may lead nowhere: it ended, or became suspect, while it stood there."""
    cancel: bool = False
    stopped: bool = False
    epoch: int = 0
    log: list[Any] = field(default_factory=list)
    seq: int = 0
    at: int | None = None
    """When its checkpoint was last written or renewed; None without one."""
    state: bytes = b""
    fingerprint: str = ""
    attempt: int = 0
    left: int = 0
    moved: bool = False
    """This execution has stored a checkpoint after at least a second of stepping."""
    gone: bool = False
    failed: list[str] = field(default_factory=list)
    """Names of the last four workers that were lost with it, or hung; the last one first."""

    @property
    def id(self) -> str:
        return self.new.id

    @property
    def ended(self) -> bool:
        return bool(self.verdict) and not self.requeued

    def end(self, verdict: str, execution: str, now: int) -> None:
        """Its one end; a second is the worst of all mistakes."""
        assert not self.ended, f"{self.id} ended as {self.verdict} and again as {verdict}"
        self.verdict, self.requeued, self.ended_at = verdict, False, now
        self.finished += verdict == "finished"
        self.last = f"{execution or '-'}:{verdict}"
        if not self.execution:
            self.stray = True
        self.let_go()
        self.cancel = self.stopped = False
        if verdict != "failed":  # a dead letter can be requeued, and then goes on
            self.drop_checkpoint()
        if self.again:
            self.requeued, self.again, self.stray = True, False, True

    def let_go(self) -> None:
        self.execution = self.holder = ""
        self.moved = False

    def begin_anew(self) -> None:
        """A claim has met what RQ pushed again."""
        self.verdict, self.requeued, self.last = "", False, ""
        self.attempt, self.left, self.deadline, self.failed = 0, self.new.max_retries, 0, []

    def drop_checkpoint(self) -> None:
        self.at, self.seq, self.state, self.fingerprint = None, 0, b"", ""

    def restart(self) -> None:
        """From zero; in a new epoch if there was anything."""
        self.epoch += bool(self.log or self.at is not None)
        self.log = []
        self.drop_checkpoint()


@dataclass(frozen=True)
class Call:
    """One call of a worker, a producer or a reaper."""

    verb: str
    incarnation: str = ""
    worker: str = ""
    rows: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class World:
    """The real store, and what the model knows of it."""

    def __init__(self, connection: redis.Redis) -> None:
        self.settings = Settings()
        self.store = Store(connection, self.settings)
        self.clock = Clock(connection)
        self.requests: dict[str, Expected] = {}
        self.executions: set[str] = set()
        self.beats: dict[str, int] = {}
        self.tombs: dict[str, int] = {}
        self.ready: set[str] = set()
        self.shown: dict[str, int] = {}
        self.voided: set[tuple[str, str]] = set()
        """Runs whose request was deleted or replaced: what they hold goes with their next word, or their end."""
        self.loose: set[str] = set()
        """Ids that were, or may be, used again: what is left of an earlier use may stand in indexes for a while."""
        self.plain: set[str] = set()
        """Ids that are jobs of RQ's own now, and wait."""
        self.refused: set[str] = set()
        """Those of them that were canceled: they are not run."""
        self.look = Look(connection)
        self.sound = True
        """No mistake has been found."""
        self.patient = False
        """Compare later, once for several calls."""

    @property
    def now(self) -> int:
        return self.clock.now

    @property
    def living(self) -> list[Expected]:
        return [item for item in self.requests.values() if not item.gone]

    def held_by(self, incarnation: str) -> list[Expected]:
        return [item for item in self.living if item.execution and item.holder == incarnation]

    def cut(self) -> int:
        """What was written before this moment is stale: an hour before the last sweep, not counting the last gap."""
        found: Any = self.store.connection.hmget(key("pulse"), "at", "away_from", "away_to")
        at, begun, ended = (int(value or 0) for value in found)
        swept = at if 0 < at < self.now else self.now
        cut = swept - 3_600_000
        return cut if not begun or ended > swept or cut >= ended else cut - (ended - begun)

    def is_reaped(self, incarnation: str) -> bool:
        return self.now - self.tombs.get(incarnation, -TOMBSTONE_MS) < TOMBSTONE_MS

    def apply(self, call: Call) -> Any:
        """Send a call, judge the answer, and compare everything."""
        self.sound = False
        answer = getattr(self, f"_{call.verb}")(call)
        self.sound = True
        if not self.patient:
            self.check()
        return answer

    def let_pass(self, seconds: float) -> None:
        # Sweeps go on: a request that somebody has put back loses the TTL of its end.
        self.store.promote(QUEUES, rounds=16)
        self.check()
        self.clock.advance(seconds)
        self.check()

    # --- producers -----------------------------------------------------------------------------------

    def _enqueue(self, call: Call) -> list[str]:
        answers = self.store.enqueue(call.rows, client="me")
        for new, answer in zip(call.rows, answers, strict=True):
            known = self.requests.get(new.id)
            if new.id in self.plain:
                # Until a worker has seen the new job, its hash has the nonce of the request that it was saved over.
                again = known is not None and known.new.nonce == new.nonce
                assert answer in (("already", "conflict") if again else ("conflict",)), answer
                continue
            if known is not None and not known.gone:
                assert answer == ("already" if known.new.nonce == new.nonce else "conflict"), answer
                continue
            assert answer == "accepted", answer
            deadline = self.now + round(new.deadline * 1000) if new.deadline else 0
            self.requests[new.id] = Expected(new, deadline, left=new.max_retries, stray=new.id in self.loose)
        return answers

    def delete(self, identifier: str) -> None:
        """RQ's ``Job.delete``, whatever it does."""
        item = self.requests[identifier]
        if not item.gone:
            Job.fetch(identifier, connection=self.store.connection).delete()
            self._leave(item)
            self.check()

    def _leave(self, item: Expected) -> None:
        if item.execution:
            self.voided.add((item.id, item.execution))
        item.gone = True
        self.loose.add(item.id)

    def enqueue_again(self, identifier: str) -> None:
        """RQ's ``Queue.enqueue_job`` of what it is, or was."""
        item = self.requests[identifier]
        if item.gone:
            return
        self._queue(item).enqueue_job(Job.fetch(identifier, connection=self.store.connection))
        if item.ended:
            item.requeued = True
        item.again = bool(item.execution)
        item.stopped = False  # RQ writes its status over that of its stop command; what was wanted last counts
        item.stray = True
        self.check()

    def other_job(self, identifier: str) -> None:
        """RQ's ``enqueue`` of a job of its own under the id."""
        item = self.requests[identifier]
        if not item.gone:
            self._queue(item).enqueue("operator.add", 1, 2, job_id=identifier)
            self._leave(item)
            self.plain.add(identifier)
            self.check()

    def _queue(self, item: Expected) -> Queue:
        return Queue(item.new.queue, connection=self.store.connection)

    def _cancel(self, call: Call) -> list[str]:
        """By anybody, or by the worker that was told so."""
        answers = self.store.cancel(call.rows, reason="asked", incarnation=call.incarnation, worker=call.worker)
        for (identifier, execution), answer in zip(call.rows, answers, strict=True):
            item = self.requests[identifier]
            if identifier in self.plain:
                assert answer in (("lost", "canceled") if execution else ("canceled",)), answer
                if not execution:
                    self.refused.add(identifier)
                continue
            if item.gone:
                assert answer == "unknown", answer
            elif execution and execution != item.execution:
                mine = item.last in (f"{execution}:canceled", f"{execution}:stopped")
                assert answer == ("canceled" if mine else "lost"), answer
            elif not execution and item.execution:
                assert answer == "requested", answer
                item.cancel, item.again = True, False
            elif item.ended:
                assert answer == ("canceled" if item.verdict in ("canceled", "stopped") else "ended"), answer
            else:
                assert answer == "canceled", answer
                item.end("stopped" if item.stopped else "canceled", execution, self.now)
        return answers

    # --- workers -------------------------------------------------------------------------------------

    def _heartbeat(self, call: Call) -> str:
        lives = self.store.beat(call.incarnation)
        assert not (lives and self.is_reaped(call.incarnation)), "the dead may not live on"
        status = self.store.heartbeat(
            incarnation=call.incarnation,
            worker=call.worker,
            queues=QUEUES,
            pid=4711,
            host="here",
            fingerprints=call.rows,
        ).status
        assert status == ("reaped" if self.is_reaped(call.incarnation) else "ok"), status
        if status == "ok":
            self.beats[call.incarnation] = self.now + 5000
            self.ready.add(call.incarnation)
            self.shown |= dict.fromkeys(call.rows, self.now)
        return status

    def _claim(self, call: Call) -> Any:
        incarnation, known = call.incarnation, call.options["known"]
        before = self.look
        answer = self.store.claim(incarnation=incarnation, worker=call.worker, queues=QUEUES, **call.options)
        if self.is_reaped(incarnation):
            assert answer.status == "reaped"
            assert not answer.claims
            return answer
        if answer.claims and answer.claims[0].plain:
            self._run_plain(incarnation, answer.claims)
            answer.claims.clear()
        lacking = {item.id for item in self.held_by(incarnation) if item.id not in known}
        if lacking:
            assert {claim.id for claim in answer.claims} == lacking, "what it holds was not given again"
        for claim in answer.claims:
            item = self.requests[claim.id]
            if lacking:
                assert claim.execution == item.execution
            else:
                self._give(item, claim, incarnation, call.options["task"])
            item.lease = self.now + 30_000
            place = (item.seq, len(item.log), item.epoch, item.fingerprint) if item.at else (0, 0, item.epoch, "")
            assert (claim.seq, claim.offset, claim.epoch, claim.fingerprint) == place, "not from its last checkpoint"
        assert len({claim.task for claim in answer.claims}) <= 1, "two tasks at once"
        self._check_isolation(before, incarnation)
        if answer.claims:
            self.beats.setdefault(incarnation, self.now + 5000)
        return answer

    def _run_plain(self, incarnation: str, claims: Sequence[Claim]) -> None:
        """A job of RQ's own is taken alone, and ends at once."""
        (claim,) = claims
        assert claim.id in self.plain - self.refused, f"{claim.id} is no plain job that waits"
        assert not self.held_by(incarnation)
        self.plain.remove(claim.id)
        self.voided.add((claim.id, claim.execution))
        with self.store.connection.pipeline() as pipeline:
            self.store.settle(pipeline, incarnation, claim.queue, claim.id, claim.execution)
            pipeline.execute()
        Job.fetch(claim.id, connection=self.store.connection).delete()
        self.beats.setdefault(incarnation, self.now + 5000)

    def _give(self, item: Expected, claim: Claim, incarnation: str, task: str) -> None:
        assert not item.execution, f"{item.id} was given to two"
        assert not item.ended, f"{item.id} runs after its end"
        assert not item.gone
        assert claim.execution not in self.executions
        assert task in ("", claim.task)
        assert claim.task == item.new.task
        if item.requeued:
            item.begin_anew()
        self._check_preference(item, incarnation)
        assert not item.deadline or self.now < item.deadline, "given after its deadline"
        if item.at is None or item.at < self.cut():
            item.restart()
        self.executions.add(claim.execution)
        item.execution, item.holder = claim.execution, incarnation

    def _check_preference(self, item: Expected, incarnation: str) -> None:
        """It goes to a worker that has failed it only when no other could take it, or none has for a while."""
        job = self.look.hash(key("job", item.id))
        others = [
            other
            for other, deadline in self.beats.items()
            if deadline > self.now
            and other in self.ready
            and name_of(other) not in item.failed
            and not ("company" in job and self.held_by(other))
        ]
        if name_of(incarnation) in item.failed and others:
            since = int(job.get("passed_at", self.now))
            assert self.now - since >= PATIENCE_MS, f"{item.id} goes to {incarnation} again, though there are {others}"

    def _check_isolation(self, before: Look, incarnation: str) -> None:
        self.look = Look(self.store.connection)
        isolating = self.look.zset(key("isolating"))
        if incarnation in isolating.keys() - before.zset(key("isolating")).keys():
            living = sum(deadline > self.now for deadline in self.beats.values())
            assert len(isolating) <= max(1, living // 2), "too many isolate"

    def _progress(self, call: Call) -> list[str]:
        answers = self.store.progress(call.incarnation, call.rows)
        for row, answer in zip(call.rows, answers, strict=True):
            item = self.requests[row.id]
            assert answer == self._expect_progress(item, row), (answer, row, item)
        return answers

    def _expect_progress(self, item: Expected, row: Progress) -> str:
        if item.gone or row.execution != item.execution:
            return "lost"
        item.lease = self.now + 30_000
        if item.cancel or item.stopped:
            return "cancel"
        if (gap := self._append(item, row)) is not None:
            return gap
        if row.seq > item.seq:
            assert item.fingerprint in ("", row.fingerprint), "two models in one epoch"
            item.seq, item.at, item.fingerprint = row.seq, self.now, row.fingerprint
            item.state = row.state if isinstance(row.state, bytes) else b""
            item.moved = row.stepped >= 1
        if item.deadline and self.now >= item.deadline:
            item.end("failed", item.execution, self.now)
            return "deadline"
        return "ok"

    def _append(self, item: Expected, row: Progress | Finish) -> str | None:
        if row.offset > len(item.log):
            return f"gap {len(item.log)}"
        if row.outputs and row.offset + row.outputs > len(item.log):
            assert row.offset == len(item.log)
            item.log += unpack(row.blob)[2]
        return None

    def _renew(self, call: Call) -> list[str]:
        answers = self.store.renew(call.incarnation, call.rows)
        for (identifier, execution), answer in zip(call.rows, answers, strict=True):
            item, expected = self.requests[identifier], "ok"
            if item.gone or execution != item.execution:
                expected = "lost"
            else:
                item.lease = self.now + 30_000
                item.at = self.now if item.at is not None else None
                if item.cancel or item.stopped:
                    expected = "cancel"
                elif item.deadline and self.now >= item.deadline:
                    item.end("failed", execution, self.now)
                    expected = "deadline"
            assert answer == expected, (answer, expected)
        return answers

    def _stop(self, call: Call) -> list[str]:
        answers = self.store.stop(call.incarnation, call.rows)
        for (identifier, execution), answer in zip(call.rows, answers, strict=True):
            item = self.requests[identifier]
            mine = not item.gone and execution == item.execution
            assert answer == ("cancel" if mine else "lost"), answer
            item.stopped = item.stopped or (mine and not item.cancel)
        return answers

    def _finish(self, call: Call) -> list[str]:
        answers = self.store.finish(call.incarnation, call.worker, call.rows)
        for row, answer in zip(call.rows, answers, strict=True):
            item = self.requests[row.id]
            if item.gone or row.execution != item.execution:
                expected = "already" if item.last == f"{row.execution}:finished" and not item.gone else "lost"
                if row.id in self.plain:
                    assert answer in ("lost", "already"), f"{answer}, though another job was saved over it"
                    continue
            elif (gap := self._append(item, row)) is not None:
                expected = gap
            else:
                item.end("finished", row.execution, self.now)
                expected = "ok"
            assert answer == expected, (answer, expected)
        return answers

    def _fail(self, call: Call) -> list[str]:
        answers = self.store.fail(call.incarnation, call.worker, call.rows)
        for row, answer in zip(call.rows, answers, strict=True):
            item = self.requests[row.id]
            if item.gone or row.execution != item.execution:
                assert answer in self._bygone(item, row.execution), answer
            else:
                free = not (row.crash or row.loss)
                self._decided(item, answer, row.kind, charge=row.charge, retry=row.retry, free=free)
        return answers

    def _bygone(self, item: Expected, execution: str) -> tuple[str, ...]:
        """What a call of an earlier execution may be answered."""
        if item.id in self.plain:
            return ("lost", "already")  # RQ leaves what a request's hash had, until the claim that meets it
        return ("already",) if not item.gone and item.last.startswith(f"{execution}:") else ("lost",)

    def _decided(
        self, item: Expected, outcome: str, kind: str, *, charge: bool, retry: bool = True, free: bool = False
    ) -> None:
        """An execution ended without a result. ``free``: no crash or loss counts against it."""
        execution = item.execution
        if item.cancel or item.stopped:
            assert outcome == "canceled", outcome
            # A stop that RQ wrote keeps its word, also after a cancel that came later.
            item.end("stopped" if item.stopped else "canceled", execution, self.now)
            return
        left = int(self._job(item)["retries_left"])
        if item.moved and left == item.new.max_retries - charge != item.left - charge:
            item.left = item.new.max_retries  # progress gave the budget back
        exhausted = charge and item.left < 1
        item.attempt += charge
        item.left -= charge and not exhausted
        assert left == item.left, "attempts are charged otherwise"
        if exhausted or not retry:
            assert outcome == "failed", "more attempts than it has"
        elif free:
            assert outcome != "failed" or int(self._job(item)["executions"]) >= self.settings.max_executions
        if outcome == "failed":
            item.end("failed", execution, self.now)
        else:
            assert outcome in ("queued", "scheduled"), outcome
            item.last, item.again, item.stray = f"{execution}:retried", False, item.stray or item.again
            if kind in BLAMED:
                name = name_of(item.holder)
                item.failed = [name, *(other for other in item.failed if other != name)][:4]
            item.let_go()

    def _job(self, item: Expected) -> dict[str, str]:
        found: Any = self.store.connection.hgetall(key("job", item.id))
        return {name.decode(): value.decode(errors="replace") for name, value in found.items()}

    def _release(self, call: Call) -> list[str]:
        marks = call.options["fingerprints"]
        answers = self.store.release(call.incarnation, call.worker, call.rows, reason="draining", **call.options)
        for (identifier, execution), mark, answer in reversed([*zip(call.rows, marks, answers, strict=True)]):
            item = self.requests[identifier]
            if item.gone or execution != item.execution:
                assert answer in self._bygone(item, execution), answer
                continue
            if item.cancel or item.stopped:
                assert answer == "canceled", answer
                item.end("stopped" if item.stopped else "canceled", execution, self.now)
                continue
            left = int(self._job(item)["retries_left"])
            assert left == item.left or (item.moved and left == item.new.max_retries), "a release is free"
            item.left = left
            lost = bool(mark) and self.now - self.shown.get(mark, 0) > 5000
            if answer == "failed":
                assert int(self._job(item)["executions"]) >= self.settings.max_executions
                item.end("failed", execution, self.now)
                continue
            assert answer == ("scheduled" if call.options["delay"] and not lost else "queued"), answer
            item.last, item.again, item.stray = f"{execution}:released", False, item.stray or item.again
            item.let_go()
            if lost:
                item.restart()
        return answers

    # --- recovery ------------------------------------------------------------------------------------

    def _reap(self, call: Call) -> Any:
        """Evidence against one incarnation."""
        policy = POLICIES[call.options["kind"]]
        holdings = self.held_by(call.incarnation)
        sweep = self.store.reap(
            incarnation=call.incarnation,
            kind=call.options["kind"],
            reason="seen",
            charge=policy.charge,
            crash=policy.crash,
            loss=policy.loss,
        )
        assert {row.id for row in sweep.reaped if row.id} == {item.id for item in holdings}
        self._taken(sweep.reaped, charge=policy.charge)
        assert self.is_reaped(call.incarnation)
        return sweep

    def _sweep(self, call: Call) -> Any:
        if call.options["settled"]:
            self.store.connection.hset(key("pulse"), mapping={"at": self.now, "since": self.now - 3_600_000, "gap": 0})
        silent = {name for name, deadline in self.beats.items() if deadline <= self.now}
        due = {item.id for item in self.living if item.execution and (item.lease <= self.now or item.holder in silent)}
        sweep = self.store.reap(QUEUES, kind="WORKER_LOST", reason="no heartbeat")
        assert sweep.judged or not call.options["settled"]
        taken = {row.id for row in sweep.reaped if row.id}
        assert taken == (due if sweep.judged else set()), f"due are {due}, taken were {taken}"
        self._taken(sweep.reaped, charge=False)
        return sweep

    def _taken(self, rows: Sequence[Any], *, charge: bool) -> None:
        for row in rows:
            if row.id:
                item = self.requests[row.id]
                assert (item.execution, item.holder) == (row.execution, row.incarnation)
                self._decided(item, row.outcome, row.kind, charge=charge and row.kind != "HANG")
            else:
                self.tombs[row.incarnation] = self.now
                self.beats.pop(row.incarnation, None)

    def _promote(self, call: Call) -> int:
        return self.store.promote(QUEUES)

    def _expire(self, call: Call) -> int:
        cut = self.cut()
        for item in self.living:
            if item.at is not None and item.at <= cut:
                if item.execution:
                    item.at = self.now
                elif item.ended:
                    item.drop_checkpoint()
                else:
                    item.restart()
        return self.store.expire(QUEUES)

    def requeue(self, identifier: str) -> bool:
        """As ``perdure requeue`` does: RQ's own code."""
        from perdure.scripts.cli.moves import requeue_one

        item = self.requests[identifier]
        if identifier in self.plain:
            return False
        done = requeue_one(self.store.connection, item.new.queue, identifier)
        if item.requeued and not item.gone:
            assert item.verdict == "failed" or not done  # RQ's enqueue_job leaves it among the failed until its claim
        else:
            assert done == (not item.gone and item.verdict == "failed"), "only a dead letter is requeued"
        if done:
            item.requeued, item.stray = True, True
        self.check()
        return done

    # --- everything ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare all of Redis with the model."""
        self.sound = False
        self.look = Look(self.store.connection)
        for item in self.living:
            self._check_job(item)
        self._check_holdings()
        self.sound = True

    def _check_job(self, item: Expected) -> None:
        look, name = self.look, key("job", item.id)
        if name not in look.raw:
            kept = 1000 * (item.new.result_ttl if item.verdict == "finished" else item.new.failure_ttl)
            assert item.ended, f"{item} has vanished"
            assert self.now - item.ended_at >= kept - 1000, f"{item} has vanished too early"
            item.gone = True
            return
        # What a request does not have is not written.
        job = {"execution": "", "last": "", "epoch": "0"} | look.hash(name)
        if item.requeued and not job["last"]:
            item.begin_anew()  # it was met, and left in its place: it is of another task than what the worker runs
        waits = not item.ended and not item.execution
        if waits and not item.requeued and item.deadline and self.now >= item.deadline and job["last"] == "-:failed":
            item.end("failed", "", self.now)
            waits = False
        assert job["execution"] == item.execution
        assert job["last"] == item.last
        assert job["epoch"] == str(item.epoch)
        assert [line.partition("\t")[0] for line in job.get("failed_on", "").splitlines()] == item.failed
        places = self._places(item)
        if item.id in self.loose:
            self._check_loose(item, job, places, waits=waits)
            return
        if item.execution:
            assert places.pop("leases", 0) == 1, f"{item.id} is held without a lease"
        if waits:
            apart = [name for name, times in places.items() if times and name != "queue"]
            assert apart or places["queue"], f"{item.id} is lost: it stands nowhere"
            assert len(apart) <= 1, f"{item.id} stands in {apart}"
            if "company" in job:
                item.stray = True
            elif not item.stray:
                assert sum(places.values()) == 1, f"{item.id} stands in {places}"
        else:
            if not item.stray:
                assert not places["queue"], f"{item.id} is held or has ended, and stands in its queue as well"
            assert not any(times for name, times in places.items() if name != "queue"), (
                f"{item.id} also stands in {places}"
            )
        if item.ended:
            assert job["status"] == item.verdict, (job, self.store.history(item.id))
            registry = "canceled" if item.verdict == "stopped" else item.verdict
            assert item.id in look.zset(key(registry, item.new.queue)) or self.now - item.ended_at > 1_000_000
        # Also while a requeued one waits for its claim: what lives has no TTL, what has ended has one. (RQ's
        # enqueue_job leaves the TTL of an end; the next sweep takes it away.)
        assert (look.ttl[name] > 0) == item.ended or item.requeued, f"{item.id}: TTL {look.ttl[name]}"
        self._check_outputs(item)

    def _check_loose(self, item: Expected, job: Mapping[str, str], places: Mapping[str, int], *, waits: bool) -> None:
        """What an earlier use of its id has left may stand beside it."""
        if item.execution:
            assert places["leases"] == 1, f"{item.id} is held without a lease"
        if waits:
            assert any(times for name, times in places.items() if name != "leases"), (
                f"{item.id} is lost: it stands nowhere"
            )
        if item.ended:
            assert job["status"] == item.verdict, (job, self.store.history(item.id))
        assert (self.look.ttl[key("job", item.id)] > 0) == item.ended or item.requeued
        self._check_outputs(item)

    def _places(self, item: Expected) -> dict[str, int]:
        queue = item.new.queue
        places = {name: int(item.id in self.look.zset(key(name, queue))) for name in ("leases", "retries", "suspects")}
        return places | {"queue": self.look.names(key("queue", queue)).count(item.id)}

    def _check_outputs(self, item: Expected) -> None:
        look = self.look
        log: list[Any] = []
        for raw in look.raw.get(key("output", item.id), []):
            epoch, offset, values = unpack(raw)
            assert (epoch, offset) == (item.epoch, len(log)), f"{item.id}: a gap or a repeat at {offset}"
            log += values
        assert log == item.log, f"{item.id}: {log} is not {item.log}"
        point = look.hash(key("checkpoint", item.id))
        if item.at is None:
            assert not point, f"{item.id} has a checkpoint {point}"
        else:
            assert (int(point["seq"]), int(point["offset"])) == (item.seq, len(item.log))
            assert point["fingerprint"] == item.fingerprint
            assert self._same_times({item.id: int(point["at"])}, {item.id: item.at})
            assert look.field(key("checkpoint", item.id), "state") == item.state
        assert (item.id in look.zset(key("checkpoints"))) == (item.at is not None)
        for stem in ("output", "checkpoint", "history"):
            assert look.ttl.get(key(stem, item.id), 1) > 0 or not item.ended, f"{item.id}: its {stem} has no TTL"
        ends = [fields for _, fields in look.raw.get(key("results", item.id), [])]
        # Enqueued again after its end it finishes again, and each time is told.
        assert sum(fields[fields.index(b"type") + 1] == b"1" for fields in ends) <= item.finished, "finished twice"

    def _check_holdings(self) -> None:
        look = self.look
        held = {
            (name, identifier, execution)
            for name, where in look.below("held").items()
            for identifier, execution in look.hash(where).items()
        }
        ours = {(item.holder, item.id, item.execution) for item in self.living if item.execution}
        assert held >= ours
        assert {(identifier, execution) for _, identifier, execution in held - ours} <= self.voided
        leases = {
            identifier: score for queue in QUEUES for identifier, score in look.zset(key("leases", queue)).items()
        }
        owned = {item.id: item.lease for item in self.living if item.execution}
        assert self._same_times(leases, owned)
        assert leases.keys() - owned.keys() <= self.loose
        running = {f"{item.id}:{item.execution}" for item in self.living if item.execution}
        shown = {name for queue in QUEUES for name in look.zset(key("wip", queue))}
        assert shown >= running
        assert shown - running <= {f"{identifier}:{execution}" for identifier, execution in self.voided}
        for name in {holder for holder, _, _ in ours}:
            mine = [item.id for item in self.held_by(name)]
            company = [int(look.hash(key("job", item)).get("company", "128")) for item in mine]
            assert len(mine) <= min(company), f"{mine} run together, with a suspect that allows {min(company)}"
        self._check_beats()

    def _same_times(self, found: Mapping[str, float], expected: Mapping[str, float]) -> bool:
        """Whether these are among those that stand in Redis, with their times."""
        return expected.items() <= found.items()

    def _check_beats(self) -> None:
        assert self.look.zset(key("beats")) == self.beats
