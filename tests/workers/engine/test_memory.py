"""Device memory runs out: requests go on in a smaller batch, wait for room, or fail with their numbers.

The engine loop, courier and claimer turn by turn over a real server. The error is torch's own, raised by tasks; that
of a real device is in ``tests/workers/engine/test_gpu_failures.py``.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Generator, Iterable
from typing import Any

import pytest
import redis

from perdure.protocol.errors import InvalidRequest
from perdure.protocol.settings import Settings
from perdure.workers.engine import engines
from perdure.workers.pool import statuses
from perdure.workers.tasks.base import BatchTask, Request, Step, Task
from perdure.workers.tasks.members import Members
from perdure.workers.text import Generate
from perdure.workers.text.golden import answers
from tests.kit.workers.bench import Turns
from tests.kit.workers.text import batch_of

torch = pytest.importorskip("torch")

LOG = logging.getLogger("rq.worker")


class Device(BatchTask):
    """Counts to ``n`` for each. A pass over more than ``holds`` units is out of memory, when it is half done."""

    slots = 8
    holds = 3

    def __init__(self) -> None:
        self.running: dict[str, list[Any]] = {}
        self.sizes: list[int] = []
        self.log: list[tuple[str, str]] = []

    def admit(self, request: Request) -> None:
        assert request.id not in self.running
        self.log.append(("admit", request.id))
        self.running[request.id] = [len(request.outputs), request.payload]

    def step(self) -> Iterable[Step]:
        self.sizes.append(len(self.running))
        for name, entry in list(self.running.items()):
            index, payload = entry
            entry[0] += 1
            if index == payload["n"]:
                del self.running[name]
                yield Step(request_id=name, result=index)
            else:
                yield Step(request_id=name, output=index)
            if sum(payload.get("size", 1) for _, payload in self.running.values()) > self.holds:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def drop(self, request_id: str) -> None:
        self.log.append(("drop", request_id))
        self.running.pop(request_id, None)


@pytest.fixture
def turns(connection: redis.Redis) -> Turns:
    return Turns(connection, Device())


def counted(turns: Turns, *names: str, n: int) -> None:
    """Each finished, with every output once, and nobody was charged."""
    for name in names:
        record = turns.record(name)
        assert (record.status, record.attempt) == ("finished", 0), turns.reasons(name)
        assert turns.pool.store.all_outputs(name) == list(range(n))


def test_a_batch_that_is_too_large_goes_on_in_smaller_ones(turns: Turns) -> None:
    """Half as many at once, from the front of the queue, in their order; nobody is charged, nothing comes twice."""
    names = [f"r{number}" for number in range(8)]
    turns.submit_all({name: {"n": 12} for name in names})
    device = turns.engine.batch
    assert isinstance(device, Device)
    turns.run(*names)
    counted(turns, *names, n=12)
    assert max(device.sizes) == 8
    assert [size for size in device.sizes if size > 3] == [8, 4]
    assert turns.engine.size.limit == 2
    assert [event for event, _ in turns.reasons("r0")] == ["released", "released"]
    assert "out of device memory in a batch of 8; this worker now runs at most 4 at once" in turns.reasons("r0")[0][1]
    first = [name for what, name in device.log if what == "admit"]
    assert first[8:12] == names[:4], "in their old order"
    starts = [turns.record(name).started_at for name in names]
    assert starts == sorted(starts)
    assert turns.loop.exit_code == 0


def test_what_waits_keeps_its_place(turns: Turns) -> None:
    """What was handed back stands in front of what came later."""
    names = [f"r{number}" for number in range(8)]
    turns.submit_all({name: {"n": 12} for name in names})
    turns.until(lambda: turns.holdings.handbacks)
    turns.submit_all({"late": {"n": 1}})
    turns.round()
    assert turns.pool.waiting() == [*names[4:], "late"]
    assert list(turns.holdings.held) == names[:4]


@pytest.mark.slow
def test_exact_text_is_the_same_after_a_smaller_batch(connection: redis.Redis) -> None:
    """Occupancy changes, shapes do not: byte for byte what each gives alone, also what the failed pass had computed."""
    settings = Settings(model="tiny", device="cpu", threads=1, slots=8)
    payloads = {
        f"t{number}": {
            "prompt": "What outlives its process? " * (1 + number % 3),
            "max_tokens": 14 + number,
            "temperature": 1.0,
            "seed": number,
            "n": 1 + number % 2,
        }
        for number in range(6)
    }

    class Small(Generate):
        """A device with room for three requests, once they have begun to answer."""

        failed = 0

        def step(self) -> list[Step]:
            steps = super().step()
            if len(self._loaded()) > 3 and any(step.output for step in steps):
                self.failed += 1
                raise torch.OutOfMemoryError("what the pass has computed is lost")
            return steps

    task = Small(settings)
    turns = Turns(connection, task)
    turns.submit_all(payloads)
    rows, chunk = batch_of(task)._llama.rows, batch_of(task)._llama.chunk
    turns.run(*payloads)
    assert task.failed
    assert turns.engine.size.limit < 6
    assert (batch_of(task)._llama.rows, batch_of(task)._llama.chunk) == (rows, chunk)
    assert [turns.pool.store.result(name) for name in payloads] == answers(payloads.items(), settings)
    for name in payloads:
        assert turns.record(name).attempt == 0


def test_one_that_does_not_fit_alone_fails_with_its_numbers(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kind, needed and free; its mates are not charged, and run as many at once as before."""
    monkeypatch.setattr(Device, "memory_needed", lambda self, payload: None)
    monkeypatch.setattr(Device, "memory_free", lambda self: 1234567)
    names = [f"r{number}" for number in range(3)]
    turns.submit_all({"r0": {"n": 5}, "large": {"n": 5, "size": 9}, "r1": {"n": 5}, "r2": {"n": 5}})
    turns.until(lambda: ("retry", "GPU_OOM") in [(e.event, e.kind) for e in turns.pool.store.history("large")])
    record = turns.record("large")
    assert (record.status, record.attempt) == ("scheduled", 1)
    reason = turns.reasons("large")[-1][1]
    assert "does not fit into the device's memory" in reason
    assert "1,234,567 bytes free" in reason
    assert "Tried to allocate 2.00 GiB" in reason
    turns.run(*names)
    counted(turns, *names, n=5)
    assert turns.engine.size.limit == 8
    assert "memory" not in turns.holdings.capacity.limits


def test_three_single_requests_without_memory_end_the_process(turns: Turns) -> None:
    """With a status of its own; what else it holds is handed back, uncharged."""
    turns.submit_all({f"large{number}": {"n": 5, "size": 9} for number in range(3)} | {"small": {"n": 5}})
    turns.until(lambda: turns.loop.exit_code)
    assert turns.loop.exit_code == statuses.OUT_OF_MEMORY == 71
    assert turns.holdings.stopping
    turns.loop.run()
    turns.courier._leave()
    assert turns.pool.waiting() == ["small"]
    assert turns.record("small").attempt == 0
    for number in range(3):
        assert turns.record(f"large{number}").attempt == 1


def test_a_failed_steps_tensors_are_freed_before_the_next(connection: redis.Redis) -> None:
    """A traceback refers to what its frames have made, for as long as anybody has the error."""
    seen: list[bool] = []

    class Pinning(Device):
        made: Any = None

        def step(self) -> list[Step]:
            large = torch.zeros(1000)
            self.made = weakref.ref(large)
            try:
                raise torch.OutOfMemoryError("of the library")
            except torch.OutOfMemoryError as error:
                raise RuntimeError("wrapped by the task") from error

        def memory_free(self) -> int:
            if self.made is not None:
                gc.disable()
                seen.append(self.made() is None)
                gc.enable()
            return 10

    turns = Turns(connection, Pinning())
    turns.submit_all({"a": {"n": 1}, "b": {"n": 1}})
    turns.until(lambda: len(seen) >= 2)
    assert all(seen)


def test_an_admission_without_memory_waits_for_a_smaller_batch(connection: redis.Redis) -> None:
    """The one that was to be taken in goes back; those that run do not notice."""

    class Tight(Device):
        holds = 100

        def admit(self, request: Request) -> None:
            if len(self.running) == 3:
                raise torch.OutOfMemoryError("for its keys")
            super().admit(request)

    turns = Turns(connection, Tight())
    names = [f"r{number}" for number in range(6)]
    turns.submit_all({name: {"n": 10} for name in names})
    turns.run(*names)
    counted(turns, *names, n=10)
    assert [turns.record(name).executions for name in names[:3]] == [1, 1, 1]
    assert turns.record("r3").executions == 2


def test_a_member_without_memory_leaves_the_others_alone(connection: redis.Redis) -> None:
    """It goes back to its checkpoint, the others run on in their threads; then fewer run at once."""
    failed: list[str] = []

    def crowd(request: Request) -> Generator[Step, None, Any]:
        for index in range(len(request.outputs), 30):
            if index == 5 and request.payload.get("fails") and not failed:
                failed.append(request.id)
                raise torch.OutOfMemoryError("once")
            yield Step(output=index)

    turns = Turns(connection, Task(crowd, slots=4))
    turns.submit_all({name: {"fails": name == "b"} for name in "abcd"})
    turns.run(*"abcd")
    counted(turns, *"abcd", n=30)
    assert failed == ["b"]
    assert turns.engine.size.limit == 2
    assert [turns.record(name).executions for name in "abcd"] == [1, 2, 1, 1]
    assert isinstance(turns.engine.batch, Members)
    turns.engine.batch.close()


class Counted(Device):
    """Knows what a request needs, and what is free of 100."""

    holds = 10**9

    def memory_needed(self, payload: Any) -> int:
        return int(payload["needs"])

    def memory_free(self) -> int:
        return 100 - sum(int(payload["needs"]) for _, payload in self.running.values())


def test_a_request_waits_until_there_is_room(connection: redis.Redis) -> None:
    """In its order, without a failure, and no further one is claimed meanwhile."""
    task = Counted()
    turns = Turns(connection, task)
    needs = {"a": 60, "b": 30, "c": 50, "d": 10}
    turns.submit_all({name: {"n": 8, "needs": number} for name, number in needs.items()})
    turns.until(lambda: turns.engine.waiting)
    assert list(turns.engine.admitted) == ["a", "b"]
    assert list(turns.engine.waiting) == ["c"]
    turns.turn(3)
    assert turns.pool.waiting() == ["d"], "it would fit, but it is not its turn"
    turns.run(*needs)
    counted(turns, *needs, n=8)
    assert [name for what, name in task.log if what == "admit"] == list(needs)
    assert not [name for what, name in task.log if what == "drop"]
    assert [turns.record(name).executions for name in needs] == [1, 1, 1, 1]


def test_what_never_fits_fails_with_its_numbers(connection: redis.Redis) -> None:
    """At once, also while others run; by the policy for device memory, since another worker may have more."""
    turns = Turns(connection, Counted())
    turns.submit_all({"a": {"n": 50, "needs": 10}, "large": {"n": 1, "needs": 2000}, "b": {"n": 5, "needs": 10}})
    turns.until(lambda: turns.record("large").attempt)
    assert not turns.record("a").ended
    event = turns.pool.store.history("large")[-1]
    assert (event.event, event.kind) == ("retry", "GPU_OOM")
    assert "2,000 bytes needed, 100 bytes free" in event.reason
    turns.run("a", "b")
    assert turns.engine.size.limit == 8
    assert turns.loop.exit_code == 0


def test_those_behind_one_that_waits_are_handed_back(connection: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker may have room for them; the first of them stays, so that it is not handed back for ever."""
    monkeypatch.setattr(engines, "PATIENCE", 0.0)
    turns = Turns(connection, Counted())
    turns.submit_all({"a": {"n": 500, "needs": 10}})
    turns.until(lambda: turns.engine.admitted)
    turns.submit_all({name: {"n": 3, "needs": 95} for name in "bcde"})
    turns.until(lambda: turns.engine.waiting)
    turns.turn(3)
    assert list(turns.engine.waiting) == ["b"]
    assert list(turns.holdings.held) == ["a", "b"]
    assert turns.pool.waiting() == ["c", "d", "e"]


def test_one_that_waits_may_be_canceled(connection: redis.Redis) -> None:
    """It is told like a running one."""
    turns = Turns(connection, Counted())
    turns.submit_all({"a": {"n": 500, "needs": 90}, "b": {"n": 1, "needs": 50}})
    turns.until(lambda: turns.engine.waiting)
    turns.pool.cancel("b")
    turns.holdings.held["b"].cancel()
    turns.until(lambda: turns.record("b").ended)
    assert turns.record("b").status == "canceled"
    assert turns.engine.waiting == {}
    assert list(turns.engine.admitted) == ["a"]


def test_the_smallest_limit_rules(turns: Turns) -> None:
    """Several reasons limit the slots, each by its name; none leaves less than one."""
    holdings = turns.holdings
    holdings.capacity.limit("other", 5)
    holdings.capacity.limit("degraded", 2)
    with holdings.lock:
        assert holdings.capacity.limited(8) == 2
    holdings.capacity.limit("degraded", None)
    holdings.capacity.limit("degraded", None)
    with holdings.lock:
        assert (holdings.capacity.limited(8), holdings.capacity.limited(3)) == (5, 3)
    holdings.capacity.limit("other", 0)
    turns.submit_all({name: {"n": 500} for name in "abc"})
    turns.turn(5)
    assert list(turns.holdings.held) == ["a"]


def lost(turns: Turns, names: Iterable[str]) -> None:
    """The worker leaves by itself; all fail by the device's error, with what they had put out."""
    turns.until(lambda: turns.loop.fitness.left)
    assert turns.loop.exit_code == statuses.UNFIT_DEVICE == 70
    turns.loop.run()
    turns.courier._leave()
    assert turns.holdings.held == {}
    for name in names:
        assert (turns.record(name).attempt, turns.pool.field(name, "company")) == (0, "1"), turns.reasons(name)
        assert turns.pool.store.all_outputs(name) == list(range(len(turns.pool.store.all_outputs(name))))


@pytest.mark.parametrize("how", ["raised", "wrapped", "step", "dropping"])
def test_nothing_is_called_after_an_error_of_the_device(connection: redis.Redis, how: str) -> None:
    """Neither to drop, nor to ask, wherever the error came from."""
    calls: list[str] = []

    class Broken(Device):
        broken = False

        def step(self) -> Iterable[Step]:
            calls.append("step" if self.broken else "")
            if how == "dropping" or self.sizes != [3, 3]:
                yield from super().step()
                return
            self.broken = True
            error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            if how == "raised":
                raise error
            if how == "wrapped":
                raise RuntimeError("the model failed") from error
            yield Step(request_id="b", error=error)

        def admit(self, request: Request) -> None:
            calls.append("admit" if self.broken else "")
            super().admit(request)

        def memory_free(self) -> int | None:
            calls.append("memory_free" if self.broken else "")
            return None

        def drop(self, request_id: str) -> None:
            calls.append("drop" if self.broken else "")
            if how == "dropping":
                self.broken = True
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    turns = Turns(connection, Broken())
    turns.submit_all({name: {"n": 500} for name in "abc"})
    turns.until(lambda: len(turns.engine.admitted) == 3)
    if how == "dropping":
        turns.loop._drop("c")
    lost(turns, "ab" if how == "dropping" else "abc")
    assert set(calls) == {""}


def test_members_are_left_alone_after_an_error_of_the_device(connection: redis.Redis) -> None:
    """Their generators are not closed, and the process does not wait for their steps."""
    closed: list[str] = []

    def crowd(request: Request) -> Generator[Step, None, Any]:
        try:
            for index in range(500):
                if index == 5 and request.id == "b":
                    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
                yield Step(output=index)
        except GeneratorExit:
            closed.append(request.id)
            raise

    turns = Turns(connection, Task(crowd, slots=3))
    turns.submit_all({name: {} for name in "abc"})
    lost(turns, "abc")
    assert closed == []
    assert isinstance(turns.engine.batch, Members)
    for name in "abc":
        turns.engine.batch.drop(name)  # for the threads of this test
    turns.engine.batch.close()


class Checked(Device):
    """Asks of its payload what an invalid one cannot answer, before anything has refused it."""

    def memory_needed(self, payload: Any) -> int | None:
        return int(payload["n"]) * 1000

    def memory_free(self) -> int | None:
        return 100_000

    def admit(self, request: Request) -> None:
        if not isinstance(request.payload.get("n"), int):
            raise InvalidRequest("n is a whole number", "n")
        super().admit(request)


class CheckedFirst(Checked):
    """Has a check of its own: an answer to what is no number must not be taken for one."""

    def check(self, payload: Any) -> None:
        if not 0 <= payload.get("n", -1) <= 10**6:
            raise InvalidRequest("n is from 0 to 1,000,000", "n")


@pytest.mark.parametrize(
    ("task", "payload", "kind", "reason"),
    [
        (Checked, {"n": "many"}, "INVALID_REQUEST", "n is a whole number"),
        (Checked, {}, "INVALID_REQUEST", "n is a whole number"),
        (CheckedFirst, {"n": 10**9}, "INVALID_REQUEST", "n is from 0 to 1,000,000"),
    ],
)
def test_invalid_payloads_are_refused_before_memory(
    connection: redis.Redis, task: type[Checked], payload: Any, kind: str, reason: str
) -> None:
    """The client hears what is wrong with its payload, once, and not what `memory_needed` made of it."""
    turns = Turns(connection, task())
    turns.submit_all({"bad": payload, "good": {"n": 2}})
    turns.run("bad", "good")
    record = turns.record("bad")
    assert (record.status, record.error_kind) == ("failed", kind)
    assert record.error_reason.startswith(reason)
    counted(turns, "good", n=2)


def test_a_memory_that_cannot_be_told_fails_as_before(connection: redis.Redis) -> None:
    """The payload is what the task takes: it is its own error, and the request has left the engine again."""

    class Confused(Device):
        def memory_needed(self, payload: Any) -> int | None:
            raise ArithmeticError("of its own")

    task = Confused()
    turns = Turns(connection, task)
    turns.submit_all({"bad": {"n": 1}})
    turns.until(lambda: turns.record("bad").attempt)
    assert task.running == {}
    assert "of its own" in turns.reasons("bad")[0][1]
