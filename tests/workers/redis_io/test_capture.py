"""Which states are captured, and that outputs are never stored without the state that belongs to them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.protocol.keys import key
from perdure.protocol.packed_state import CHUNK, unpack_state
from perdure.protocol.settings import Settings
from perdure.protocol.states import State
from perdure.protocol.transitions.calls import Claim, Failure, Progress
from perdure.workers.engine.loop import EngineLoop
from perdure.workers.leases import holding as module
from perdure.workers.leases.holding import Holding
from perdure.workers.redis_io import uploads
from perdure.workers.tasks.base import Step
from tests.kit.places import TASKS
from tests.kit.protocol.pool import TASK
from tests.kit.workers.bench import Bench

DUE = Settings(checkpoint_interval=1e-9)
NOT_DUE = Settings(checkpoint_interval=1e9)


@pytest.fixture
def bench(connection: redis.Redis) -> Bench:
    return Bench(connection)


def new() -> Holding:
    claim = Claim(
        id="a",
        execution="e",
        queue="gpu",
        plain=False,
        task=TASK,
        payload=b"",
        attempt=1,
        seq=0,
        offset=0,
        epoch=0,
        fingerprint="",
        client="",
        timeout=-1,
    )
    return Holding.of(claim)


def state(number: int) -> Any:
    return [number, b"s" * 100]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["both", "both", "both", "both", "output", "state", "neither"]),
        st.sampled_from([DUE, NOT_DUE]),
        st.sampled_from(["nothing", "send", "confirm"]),
    ),
    max_size=40,
)


@given(STEPS, st.sampled_from(["killed", "failed", "finished"]), st.sampled_from([1, 3, module.MAX_CALL]))
@settings(max_examples=120, deadline=None)
def test_what_is_stored_at_any_moment_fits_together(steps, end, most):
    """For each moment at which a worker may be killed: all outputs up to the stored state, none beyond a later one.

    Also when what was put out goes to Redis in several calls, of ``most`` bytes of outputs where that can be.
    """
    large, module.LARGE = module.LARGE, 50
    usual, module.MAX_CALL = module.MAX_CALL, most
    try:
        holding, outputs, kept = new(), 0, -1
        last_state, outputs_at, states = -1, {-1: 0}, []
        put_out = 0
        for number, (kind, when, courier) in enumerate(steps):
            carries_output, carries_state = kind in ("both", "output"), kind in ("both", "state")
            put_out += carries_output
            if carries_state:
                last_state = number
                outputs_at[number] = put_out
            if carries_output:
                states.append(last_state)
            values: dict[str, Any] = {"output": number} if carries_output else {}
            holding.add(Step(**values, **({"state": state(number)} if carries_state else {})), when)
            if courier != "nothing":
                holding.next_progress()
            if courier == "confirm" and holding.flight is not None:
                outputs, kept = taken(holding, outputs, kept)
            assert kept >= (states[outputs - 1] if outputs else -1), "an output without its state"
            assert outputs >= outputs_at[kept], "a state without its outputs"
        if end == "failed":
            holding.add(Step(error=ValueError("broken")), DUE)
            while holding.next_progress() is not None:
                outputs, kept = taken(holding, outputs, kept)
            assert isinstance(holding.ended, Failure)
            assert kept >= (states[outputs - 1] if outputs else -1)
            assert outputs >= outputs_at[kept]
        if end == "finished":
            holding.add(Step(result="done"), DUE)
            while holding.next_progress() is not None:
                outputs, kept = taken(holding, outputs, kept)
                assert kept >= (states[outputs - 1] if outputs else -1), "an output without its state"
            assert holding.finishing
            assert outputs + holding.next_finish(DUE).outputs == put_out
    finally:
        module.LARGE, module.MAX_CALL = large, usual


def taken(holding: Holding, outputs: int, kept: int) -> tuple[int, int]:
    """Redis has stored the flight: so many outputs, and the number of the state."""
    flight = holding.flight
    assert flight is not None
    assert flight.offset == outputs
    holding.sendings += 1
    if flight.state is not None:
        assert not isinstance(flight.state, bytes)
        kept = unpack_state(b"".join(flight.state.stored.pieces))[0]
    holding.confirm()
    return holding.offset, kept


def test_a_large_state_is_copied_no_faster_than_stored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is on its way, later ones are passed over; at each moment, what Redis has fits together."""
    monkeypatch.setattr(uploads, "BUDGET", 0.0)
    bench.pool.submit("a")
    bench.claim()
    captures: set[int] = set()
    for number in range(1, 41):
        bench.offer("a", Step(output=number, state=[number, b"s" * (3 * CHUNK // 2)]))
        if (packed := bench.holdings.held["a"].state) is not None:
            captures.add(id(packed))
        if number % 2:
            bench.round()
        found, sound = bench.pool.store.state("a")
        assert sound
        assert bench.pool.store.all_outputs("a") == list(range(1, (found[0] if found else 0) + 1))
    assert found[0] > 20
    assert bench.holdings.held["a"].size < 1000
    bench.offer("a", Step(result="done"))
    bench.round()
    bench.round()
    assert bench.pool.store.all_outputs("a") == list(range(1, 41))
    assert not list(bench.pool.connection.scan_iter(f"{key('chunk')}*"))


def test_small_states_are_all_captured():
    """Only what is large is passed over: with it, nothing that was put out is behind."""
    holding = new()
    for number in range(10):
        holding.add(Step(output=number, state=state(number)), NOT_DUE)
        assert holding.state is not None
    assert (holding.pending, holding.behind) == (list(range(10)), [])


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Holding:
    """One with a state that was passed over."""
    monkeypatch.setattr(module, "LARGE", 50)
    holding = new()
    for number in range(4):
        holding.add(Step(output=number, state=state(number)), NOT_DUE)
    assert (holding.pending, holding.behind) == ([0, 1], [2, 3])
    return holding


def test_a_durable_step_captures_its_state(behind: Holding):
    """It is waited for."""
    behind.add(Step(output=4, state=state(4), durable=True), NOT_DUE)
    assert (behind.pending, behind.behind) == ([0, 1, 2, 3, 4], [])


def test_many_bytes_behind_capture_the_next_state(behind: Holding):
    """What waits in the worker is bounded."""
    behind.add(Step(output=b"x" * (module.MAX_BEHIND + 1), state=state(4)), NOT_DUE)
    assert len(behind.behind) == 3
    behind.add(Step(output=5, state=state(5)), NOT_DUE)
    assert (len(behind.pending), behind.behind) == (6, [])


@pytest.mark.parametrize("how", ["durable", "bytes", "seconds"])
def test_outputs_without_their_state_are_computed_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The task stops giving states: the request goes back to its last checkpoint, and from then on all are kept."""
    monkeypatch.setattr(module, "LARGE", 50)
    bench.pool.submit("a")
    bench.claim()
    for number in range(4):
        bench.offer("a", Step(output=number, state=state(number)))
    held = bench.holdings.held["a"]
    assert held.behind == [2, 3]
    bench.offer("a", Step(output=4))
    assert held.behind == [2, 3, 4]
    if how == "seconds":
        assert held.behind_since is not None
        held.behind_since -= 1000
    output = b"x" * (module.STUCK_BYTES - 100) if how == "bytes" else 5
    last = [Step(output=output, request_id="a", durable=how == "durable")] + [
        Step(output=b"y" * 200, request_id="a")
    ] * (how == "bytes")
    execution = held.claim.execution
    assert bench.holdings.offer(last, {"a": execution}) == ["a"]
    bench.round()
    claim = bench.holdings.held["a"].claim
    assert claim.execution != execution
    assert claim.offset == 2
    assert bench.pool.store.state("a") == (state(1), True)
    assert bench.pool.events("a") == ["released"]
    for number in range(2, 6):
        bench.offer("a", Step(output=number, state=state(number)))
    assert bench.holdings.held["a"].behind == []


def test_a_device_error_during_a_copy_is_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that failed may show itself only there: the request fails by its kind, and the loop hears of it."""

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("copying")

    monkeypatch.setattr(module, "pack_state", broken)
    bench.pool.submit("a")
    bench.claim()
    execution = bench.holdings.held["a"].claim.execution
    assert bench.holdings.offer([Step(state=1, request_id="a")], {"a": execution}) == ["a"]
    assert [type(error) for error in bench.holdings.raised] == [MemoryError]
    assert isinstance(bench.holdings.held["a"].ended, Failure)


def test_without_the_library_a_compressed_state_is_released(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is not failed and keeps its checkpoint; the history says what to install. With it, it goes on."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(TASKS)])
    identifier = "a"
    bench.pool.submit(identifier, task="lab_tasks.count")
    bench.claim()
    bench.holdings.settings = bench.settings.replace(compression="zstd")
    bench.offer(identifier, Step(output="x", state=["z" * 5000]))
    bench.round()
    checkpoint = bench.pool.store.checkpoint(identifier)
    assert checkpoint is not None
    assert checkpoint.bytes < 500
    bench.pool.reap(bench.courier.incarnation)
    bench.courier._rejoin()
    bench.claim()
    loop = EngineLoop(bench.holdings, bench.settings, lambda claim: None, lambda shown: None)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zstandard", None)
        loop._read_mail()
        bench.round()
    event = bench.pool.store.history(identifier)[-1]
    assert event.event == "released"
    assert "pip install 'perdure[zstd]'" in event.reason
    assert bench.pool.due_in(identifier) > 0
    bench.pool.make_due(identifier)
    bench.holdings.wanting = True
    bench.claim()
    assert bench.pool.store.state(identifier) == (["z" * 5000], True)
    assert bench.holdings.held[identifier].claim.offset == 1


def test_many_outputs_of_one_step_are_stored_in_several_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them carries more than one output above its bytes, and those of others go on between them."""
    monkeypatch.setattr(module, "MAX_CALL", 1000)
    sent: list[tuple[str, int]] = []
    progress = bench.pool.store.progress

    def noted(incarnation: str, rows: list[Progress]) -> list[str]:
        sent.extend((row.id, len(row.blob)) for row in rows)
        return progress(incarnation, rows)

    monkeypatch.setattr(bench.pool.store, "progress", noted)
    bench.pool.submit("a", "b")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.claim()
    bench.offer("a", *[Step(output=f"{number}{'x' * 300}") for number in range(30)], Step(result="done"))
    for number in range(20):
        bench.offer("b", Step(output=number, state=number))
        bench.round()
    assert bench.pool.status("a") is State.FINISHED
    assert [output[:2] for output in bench.pool.store.all_outputs("a")] == [f"{n}xx"[:2] for n in range(30)]
    assert len(bench.pool.store.outputs("a")) == 10
    assert max(size for _, size in sent) < 1100
    assert bench.pool.store.all_outputs("b") == list(range(20))


def test_a_step_too_large_for_one_call_fails_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers: how much it was, and what the limit is."""
    monkeypatch.setattr(module, "MAX_TOGETHER", 1000)
    bench.holdings.settings = bench.settings.replace(max_payload=900)
    bench.pool.submit("a", "b")
    bench.claim()
    bench.holdings.capacity.loaded(TASK, 4, None)
    bench.claim()
    rows = [Step("x" * 300, number, "a") for number in range(5)] + [Step("fine", 1, "b")]
    executions = {name: bench.holdings.held[name].claim.execution for name in ("a", "b")}
    assert bench.holdings.offer(rows, executions) == ["a"]
    for _ in range(3):
        bench.round()
    record = bench.pool.store.fetch("a")
    assert record is not None
    assert (record.status, record.error_kind) == ("failed", "INVALID_REQUEST")
    assert "4 outputs" in record.error_reason
    assert "1,212 bytes, more than the 1,000" in record.error_reason
    assert bench.pool.store.all_outputs("b") == ["fine"]
