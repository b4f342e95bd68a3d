"""Large states of real workers: what is resumed is, bit by bit, what belongs to the outputs that are stored."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import redis

from perdure.protocol.keys import key
from perdure.protocol.packed_state import CHUNK
from perdure.protocol.states import State
from perdure.scripts.pool.server import Server
from perdure.workers.redis_io import uploads
from perdure.workers.tasks.base import Request, Step
from tests.kit.lab import Lab, eventually
from tests.kit.places import TASKS
from tests.kit.workers.bench import Bench
from tests.kit.workers.proxy import Proxy

SIZE = 3 * CHUNK // 4 + 1000
"""Numbers of four bytes: a little more than 3 MiB."""


@pytest.fixture
def bench(connection: redis.Redis) -> Bench:
    return Bench(connection)


def undisturbed(payload: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """Outputs and result of the task, run here from start to end."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(TASKS)])
    from tensor_tasks import diffuse  # type: ignore[import-not-found]

    generator = diffuse(Request(id="here", payload={**payload, "sleep": 0}))
    outputs = []
    while True:
        try:
            outputs.append(next(generator).output)
        except StopIteration as stop:
            return outputs, stop.value


def chunks_of(connection: redis.Redis) -> list[bytes]:
    return list(connection.scan_iter(f"{key('chunk')}*"))


@pytest.mark.slow
def test_a_killed_worker_in_the_middle_of_writing_a_state(
    server: Server, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are stuck half written: the next worker goes on from the last whole state, bit by bit."""
    proxy = Proxy(server.port, "chunk", 0)
    try:
        payload = {"n": 60, "size": SIZE, "sleep": 0.02}
        outputs, result = undisturbed(payload, monkeypatch)
        first = lab.worker(url=proxy.url)
        one = lab.submit("tensor_tasks.diffuse", payload)
        lab.moved(one, 3)
        proxy.drops = sys.maxsize  # the same chunk is written again and again
        eventually(lambda: proxy.lost)
        first.kill()  # its guardian sees it
        before = lab.store.checkpoint(one)
        assert before is not None
        second = lab.worker()
        record = lab.ended(one)
        assert (record.status, record.epoch, record.worker) == ("finished", 0, second.name)
        assert before.seq
        assert f"resumed at output {before.offset}, checkpoint {before.seq}" in second.log
        assert lab.outputs(one) == outputs
        assert lab.store.result(one) == result
        assert chunks_of(lab.connection) == []
    finally:
        proxy.close()


@pytest.mark.slow
def test_lost_replies_to_chunks_change_nothing(server: Server, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is sent again as it was."""
    proxy = Proxy(server.port, "chunk", 3)
    try:
        payload = {"n": 20, "size": SIZE, "sleep": 0.02}
        lab.worker(url=proxy.url)
        one = lab.submit("tensor_tasks.diffuse", payload)
        assert lab.ended(one).status == "finished"
        assert (lab.outputs(one), lab.store.result(one)) == undisturbed(payload, monkeypatch)
        assert proxy.lost == 3
        assert lab.record(one).executions == 1
    finally:
        proxy.close()


# --- round by round ----------------------------------------------------------------------------------


def held(bench: Bench, *names: str) -> None:
    bench.pool.submit(*names)
    bench.claim()
    bench.holdings.capacity.loaded("app.tasks.count", 4, None)
    for _ in names[1:]:
        bench.claim()
    assert sorted(bench.holdings.held) == sorted(names)


def test_a_long_upload_keeps_nobody_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round writes some chunks and goes on to everything else; the last one commits."""
    monkeypatch.setattr(uploads, "BUDGET", 0.0)
    held(bench, "a", "b")
    state = b"s" * (4 * CHUNK)
    bench.offer("a", Step(output="large", state=state))
    bench.offer("b", Step(output="small", state=1))
    for number in range(1, 5):
        bench.round()
        assert len(chunks_of(bench.pool.connection)) == number
        assert bench.pool.store.all_outputs("b") == ["small"]
        assert bench.pool.store.all_outputs("a") == []
    bench.round()
    assert bench.pool.store.all_outputs("a") == ["large"]
    assert bench.pool.store.state("a") == (state, True)


def test_a_request_that_ends_does_not_wait_for_its_state(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs it any more: the finish takes the outputs along, and what was written of it is dropped."""
    monkeypatch.setattr(uploads, "BUDGET", 0.0)
    held(bench, "a")
    bench.offer("a", Step(output=0, state=b"s" * (4 * CHUNK)))
    bench.round()
    assert len(chunks_of(bench.pool.connection)) == 1
    bench.offer("a", Step(output=1), Step(result="done"))
    bench.round()
    assert bench.pool.status("a") is State.FINISHED
    assert (bench.pool.store.all_outputs("a"), bench.pool.store.result("a")) == ([0, 1], "done")
    assert chunks_of(bench.pool.connection) == []


def test_chunks_that_redis_loses_are_written_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicted, or gone with its last second: the commit says so."""
    monkeypatch.setattr(uploads, "BUDGET", 0.0)
    held(bench, "a")
    state = b"s" * (2 * CHUNK + 1)
    bench.offer("a", Step(output=0, state=state))
    bench.round()
    bench.round()
    bench.pool.connection.delete(*chunks_of(bench.pool.connection))
    for _ in range(4):
        bench.round()
    assert bench.pool.store.state("a") == (state, True)


def test_at_maxmemory_a_state_waits_and_the_lease_is_renewed(bench: Bench) -> None:
    """Small or in chunks; when there is room again, it is stored as if nothing had been."""
    held(bench, "a", "b")
    connection = bench.pool.connection
    bench.offer("a", Step(output=0, state=b"s" * (2 * CHUNK)))
    bench.offer("b", Step(output=0, state=1))
    for name in ("a", "b"):
        bench.pool.expire_lease(name)
    connection.config_set("maxmemory", 1)
    try:
        bench.courier.renewals.hasten()
        bench.round()
        leases: Any = connection.zrange(key("leases", "gpu"), 0, -1, withscores=True)
        assert all(deadline > 1e12 for _, deadline in leases)
        bench.offer("b", Step(output=1), Step(result="done"))
        bench.round()
        assert bench.pool.status("b") is State.FINISHED, "an end needs no checkpoint before"
        assert bench.pool.store.checkpoint("a") is None
    finally:
        connection.config_set("maxmemory", 0)
    bench.rounds()
    assert bench.pool.store.all_outputs("b") == [0, 1]
    assert bench.pool.store.all_outputs("a") == [0]
    assert bench.pool.store.state("a") == (b"s" * (2 * CHUNK), True)


def test_a_state_is_read_whole_before_its_request_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks while it is read costs nothing: the next claim gives the request again."""
    held(bench, "a")
    state = b"s" * (3 * CHUNK)
    bench.offer("a", Step(output=0, state=state))
    bench.rounds()
    assert bench.pool.store.state("a") == (state, True)
    bench.pool.reap(bench.courier.incarnation)
    bench.courier._rejoin()
    bench.letters()
    between = bench.claimer.between
    calls = []

    def broken() -> None:
        calls.append(1)
        raise redis.ConnectionError("cut")

    bench.claimer.between = broken
    with pytest.raises(redis.ConnectionError):
        bench.claim()
    assert (bench.holdings.held, bench.letters(), len(calls)) == ({}, [], 1)
    bench.claimer.between = between
    bench.claim()
    (admission,) = bench.letters()
    assert admission.request.state == b"\xc6" + (3 * CHUNK).to_bytes(4, "big") + state
