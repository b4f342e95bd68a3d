"""For users' own tests: does a task give the same answer, wherever its worker dies?

No server and no processes: the real scripts run on fakeredis, and a request passes through the claimer, the
courier and the engine loop of a worker, one round after the other, in the thread of the test.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..protocol.codec import pack
from ..protocol.errors import UnknownTask
from ..protocol.identities import new_id
from ..protocol.records import FailureKind, NewRequest
from ..protocol.settings import Settings
from ..protocol.store import Store
from ..protocol.tasks import is_task, path_of, prepared
from ..protocol.transitions.calls import Claim
from .engine.loop import EngineLoop
from .guardian.companion import Guarded
from .leases.holdings import Holdings
from .leases.mailbox import Mailbox
from .redis_io.claimer import Claimer, Limits
from .redis_io.courier import Courier
from .redis_io.line import Line
from .tasks.base import AnyTask, Step
from .tasks.members import Members

__all__ = ["Report", "resume_at_every_step"]

QUEUE = "testing"

HINTS = {
    "before": (
        "It differs before the cut, in a run like the first one. Usual causes: a module-level counter or cache, "
        "random numbers without a seed from the payload, the time of day, the order of a set."
    ),
    "after": (
        "It differs after the cut. Usual causes: request.state or request.outputs is not used when the task goes on, "
        "a variable that the next step needs is not in the state, the state is yielded in another Step than the "
        "output that it counts, random numbers whose position is not in the state."
    ),
}

Equal = Callable[[Any, Any], bool]


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`resume_at_every_step` did: ``steps`` of the uninterrupted run, where it was cut, how many runs."""

    steps: int
    cuts: list[int]
    runs: int
    outputs: list[Any]
    result: Any


def resume_at_every_step(
    task: AnyTask,
    payload: Any = None,
    *,
    equal: Equal | None = None,
    cuts: int | Iterable[int] = 32,
    behind: Sequence[int] = (0, 1),
    max_steps: int = 10_000,
    settings: Settings | None = None,
) -> Report:
    """Run a task uninterrupted, then again with a cut after each step, and compare outputs and result.

    A cut is what kill -9 does: the worker is gone, nothing of the task is closed, and another worker, with a
    fresh instance of a :class:`BatchTask` class, goes on from what is stored. Module-level variables survive
    here, as they do in a worker that gets a request back.

    ``cuts``: at most so many, spread over the steps with the first and the last, or the very steps (from 1).
    ``behind``: how many steps the stored checkpoint lies behind the cut; each is tried at each cut, 0 is a
    checkpoint of the very step. ``equal``: how two outputs, or two results, are compared; by default their packed
    bytes. ``max_steps``: more steps, or turns without any, are a failure.

    Raises ``AssertionError`` that names the cut, the output, and what was expected; ``ImportError`` without
    fakeredis; what the task's own ``prepare`` raises for the payload.
    """
    if not is_task(task):
        path_of(task)  # says what is wrong with it
    pool = _Pool(task, payload, settings or Settings(), max_steps)
    try:
        whole = pool.run()
        equal = equal or _same_bytes
        if whole.failure:
            raise AssertionError(f"the task fails without any cut:\n{whole.failure}")
        chosen = _chosen(cuts, whole.steps)
        for cut in chosen:
            for lag in sorted({min(lag, cut) for lag in behind}):
                _compare(whole, pool.run(cut, cut - lag), equal)
        return Report(whole.steps, chosen, pool.runs, whole.outputs, whole.result)
    finally:
        pool.close()


# --- comparing -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """What a request came to. ``stored``: outputs that the execution after the cut began with."""

    cut: int = 0
    checkpoint: int = 0
    steps: int = 0
    stored: int = 0
    outputs: list[Any] = field(default_factory=list)
    result: Any = None
    failure: str = ""


def _compare(expected: _Run, got: _Run, equal: Equal) -> None:
    where = f"cut after step {got.cut} of {expected.steps}, resumed from " + (
        f"the checkpoint of step {got.checkpoint} ({got.stored} outputs)" if got.checkpoint else "the start"
    )
    if got.failure:
        raise AssertionError(f"{where}: the task fails, and did not without the cut:\n{got.failure}")
    for index in range(max(len(expected.outputs), len(got.outputs))):
        wanted = repr(expected.outputs[index]) if index < len(expected.outputs) else "(none)"
        came = repr(got.outputs[index]) if index < len(got.outputs) else "(none)"
        if "(none)" in (wanted, came) or not equal(expected.outputs[index], got.outputs[index]):
            hint = HINTS["before" if index < got.stored else "after"]
            raise AssertionError(
                f"{where}: output {index} differs\n"
                f"  expected {_short(wanted)}\n  got      {_short(came)}\n"
                f"  outputs around it, expected: {_around(expected.outputs, index)}\n"
                f"  outputs around it, got:      {_around(got.outputs, index)}\n{hint}"
            )
    if not equal(expected.result, got.result):
        raise AssertionError(
            f"{where}: all {len(got.outputs)} outputs are equal, but the result differs\n"
            f"  expected {_short(repr(expected.result))}\n  got      {_short(repr(got.result))}\n{HINTS['after']}"
        )


def _around(outputs: Sequence[Any], index: int) -> str:
    start = max(0, index - 2)
    part = ", ".join(_short(repr(item), 40) for item in outputs[start : index + 3])
    return f"[{'…, ' if start else ''}{part}{', …' if len(outputs) > index + 3 else ''}]"


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _same_bytes(one: Any, other: Any) -> bool:
    # As it is stored: 1 and 1.0 and True are three answers, and NaN is equal to itself.
    return pack(one, limit=2**31, what="output") == pack(other, limit=2**31, what="output")


def _chosen(cuts: int | Iterable[int], steps: int) -> list[int]:
    if not isinstance(cuts, int):
        chosen = sorted(set(cuts))
        if wrong := [cut for cut in chosen if not 1 <= cut <= steps]:
            raise ValueError(f"cuts must lie between 1 and {steps}, the steps of this run; these do not: {wrong}")
        return chosen
    if cuts < 1:
        raise ValueError(f"cuts must be at least 1, not {cuts}")
    if steps <= cuts:
        return list(range(1, steps + 1))
    return sorted({1 + round(index * (steps - 1) / max(1, cuts - 1)) for index in range(cuts)})


# --- running -------------------------------------------------------------------------------------------


class _Pool:
    """A Redis that is only pretended, and one worker after another."""

    def __init__(self, task: AnyTask, payload: Any, settings: Settings, max_steps: int) -> None:
        self.connection = _connection()
        self.task = task
        self.path = _path(task)
        # Whatever is put out is stored in the round in which we say so.
        self.settings = settings.replace(checkpoint_interval=1e-9)
        self.max_steps = max_steps
        self.runs = 0
        # A killed worker closes nothing: what its task holds is kept until the end of all runs.
        self.killed: list[_Worker] = []
        self.payload = pack(prepared(task, payload), limit=settings.max_payload, what="payload")

    def run(self, cut: int = 0, checkpoint: int = 0) -> _Run:
        """One request to its end; with ``cut``, its worker is gone after that step."""
        self.runs += 1
        store = Store(self.connection, self.settings)
        run = _Run(cut, checkpoint)
        request = NewRequest(
            id=new_id(),
            nonce=uuid.uuid4().hex,
            queue=QUEUE,
            task=self.path,
            payload=self.payload,
            max_retries=0,
            result_ttl=3600,
            failure_ttl=3600,
            description=self.path,
        )
        assert store.enqueue([request]) == ["accepted"]
        if cut:
            first = _Worker(self, request.id)
            self.killed.append(first)
            first.run(until=cut, stored_until=checkpoint)
            store.reap(incarnation=first.courier.incarnation, kind=FailureKind.WORKER_LOST, reason="cut")
            run.stored = len(store.all_outputs(request.id))
        last = _Worker(self, request.id)
        try:
            run.steps = last.run()
        finally:
            last.close()
        record = store.fetch(request.id)
        assert record is not None
        run.outputs = store.all_outputs(request.id)
        if record.status == "finished":
            run.result = store.result(request.id)
        else:
            run.failure = f"{record.error_kind}: {record.error_reason}\n{store.traceback(request.id)}".rstrip()
        self.connection.flushall()
        return run

    def close(self) -> None:
        for worker in self.killed:
            worker.close()
        self.connection.close()


class _Recorded(Holdings):
    """Counts the steps, and stores durable ones at once: nobody else is there to do it."""

    __slots__ = ("steps", "store_now")

    def offer(self, steps: Sequence[Step], executions: Mapping[str, str]) -> list[str]:
        # A turn that also ends the request is no place to be cut at.
        self.steps += bool(steps) and not any(step.ends for step in steps)
        return super().offer(steps, executions)

    def wait_stored(self, identifiers: Sequence[str], timeout: float) -> bool:
        self.store_now()
        return True

    steps: int
    store_now: Callable[[], None]


class _Worker:
    """The inner parts of a worker process, moved by hand."""

    def __init__(self, pool: _Pool, identifier: str) -> None:
        self.pool = pool
        self.identifier = identifier
        settings = pool.settings
        store = Store(pool.connection, settings)
        self.holdings = _Recorded(settings, Mailbox())
        self.holdings.steps, self.holdings.store_now = 0, self._store
        name = f"worker-{uuid.uuid4().hex[:8]}"
        self.loop = EngineLoop(self.holdings, settings, _no_plain_jobs, lambda shown: None, find=lambda path: pool.task)
        claimer = Claimer(store, self.holdings, name, lambda: [QUEUE], Limits(), True, self.loop.log)
        line = Line(store, name, self.holdings)
        self.courier = Courier(line, claimer, tended=lambda: Guarded.WELL, rejoined=lambda incarnation: None)
        self.beat = partial(
            store.heartbeat, incarnation=self.courier.incarnation, worker=name, queues=[QUEUE], pid=1, host="testing"
        )

    def run(self, until: int = 0, stored_until: int = 0) -> int:
        """Until the request ends, or ``until`` that many steps; returns the steps. 0 is no bound."""
        self.beat()
        self.courier._round()
        if self.identifier not in self.holdings.held:
            raise AssertionError(f"no worker could claim the request any more; {self._state()}")
        turns, last = 0, time.monotonic()
        while self.identifier in self.holdings.held:
            before = self.holdings.steps
            self.loop.turn()
            moved = self.holdings.steps > before
            if moved:
                turns, last = 0, time.monotonic()
            self._check(turns, last)
            turns += 0 if self.holdings.apart else 1
            if self.holdings.handbacks:
                raise AssertionError(
                    f"the next worker cannot go on: {self.holdings.handbacks[0].reason}\n"
                    "fingerprint() must be the same for two instances that may continue each other's requests."
                )
            if moved and until and self.holdings.steps >= until:
                if self.holdings.steps <= stored_until:
                    self._store()
                break
            if not until or self.holdings.steps <= stored_until or self.holdings.storing:
                self._store()
        return self.holdings.steps

    def _store(self) -> None:
        self.holdings.urgent = True
        self.courier._round()

    def _check(self, turns: int, last: float) -> None:
        if self.holdings.steps > self.pool.max_steps or turns > self.pool.max_steps:
            raise AssertionError(
                f"the task did not end within {self.pool.max_steps} steps; a smaller payload, or a larger max_steps="
            )
        timeout = self.holdings.capacity.step_timeout(self.holdings.task)
        if self.holdings.apart and time.monotonic() - last > timeout:
            raise AssertionError(f"step {self.holdings.steps + 1} took longer than its step timeout of {timeout:g} s")

    def _state(self) -> str:
        record = self.courier.store.fetch(self.identifier)
        return "it is gone" if record is None else f"it is {record.status} ({record.error_kind} {record.error_reason})"

    def close(self) -> None:
        """Close what the task still holds."""
        for engine in self.loop._engines.loaded.values():
            for identifier in list(engine.admitted):
                engine.batch.drop(identifier)
            if isinstance(engine.batch, Members):
                engine.batch.join(1.0)
                engine.batch.close()


def _no_plain_jobs(claim: Claim) -> None:
    raise AssertionError(f"a plain job ({claim.id}) on the queue of a test")


def _connection() -> Any:
    try:
        import fakeredis
        import lupa  # noqa: F401  # without it, fakeredis knows no scripts
    except ImportError as error:
        raise ImportError('resume_at_every_step runs on fakeredis with Lua: pip install "perdure[testing]"') from error
    return fakeredis.FakeRedis(server=fakeredis.FakeServer())


def _path(task: AnyTask) -> str:
    try:
        return path_of(task)
    except UnknownTask:
        # A task inside a test function: no worker could import it, but none has to.
        return f"testing.{getattr(task, '__name__', type(task).__name__)}"
