"""What stands in RQ's keys after our scripts, against what stands there after RQ itself.

One job runs on RQ's own worker, one request by our scripts; then all keys are dumped and compared: names,
types, fields, kinds of expiry. Every difference is listed below with its reason. RQ's tools are run on ours.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job, get_current_job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.worker import Worker

from perdure.protocol.codec import RestrictedPickle
from perdure.protocol.keys import OURS, key
from perdure.protocol.records import FailureKind
from perdure.protocol.transitions.rows import STOCK_FUNCTION
from tests.kit.lab import Quiet
from tests.kit.protocol.pool import Hand, Pool, plain

Shape = dict[str, Any]

# Fields of the job hash that are ours. RQ ignores what it does not know, and its own writes leave them alone.
# retries_left is RQ's own; RQ writes it only for a job with Retry, and every request has retries.
OUR_FIELDS = {
    "task", "payload", "nonce", "client", "execution", "last", "attempt", "epoch", "claimed", "holder", "executions",
    "max_retries", "retries_left", "error_kind", "error_reason",
}  # fmt: skip

# Keys that RQ's worker writes and our scripts do not: they are the worker's, which is RQ's class in our pool too.
OF_THE_WORKER = re.compile(r"rq:(workers(:.*)?|worker:[^:]*|clean_registries:.*|clean_groups|queue:.*:intermediate)")

snapshots: list[Shape] = []


def shape(connection: redis.Redis, execution: str = "") -> Shape:
    """Every key of RQ's: its type, its fields or the form of its members, the kind of its expiry."""
    found: Any = connection.scan_iter(count=1000)
    result: Shape = {}
    for name in sorted(plain(item) for item in found):
        if name.startswith(OURS) or OF_THE_WORKER.fullmatch(name):
            continue
        kind = plain(connection.type(name))
        content: Any
        if kind == "hash":
            # What stock writes as '' may be missing: RQ reads both alike.
            fields: Any = connection.hgetall(name)
            content = {plain(field) for field, value in fields.items() if value}
        elif kind == "stream":
            entries: Any = connection.xrange(name)
            content = [set(plain(fields)) for _, fields in entries]
        elif kind == "list":
            content = plain(connection.lrange(name, 0, -1))
        elif kind == "set":
            content = plain(connection.smembers(name))
        else:
            content = plain(connection.zrange(name, 0, -1))
        if execution:
            name = name.replace(execution, "<execution>")
            content = plain([item.replace(execution, "<execution>") for item in content]) if kind != "hash" else content
        result[name] = (kind, content, expiry(connection.ttl(name.replace("<execution>", execution))))
    return result


def expiry(ttl: Any) -> str:
    """The result's TTL here is 1000 s, the failure's 2000 s, a job's timeout 180 s."""
    if ttl == -1:
        return "none"
    for name, limit in (("result", 1000), ("failure", 2000)):
        if limit - 60 < ttl <= limit:
            return name
    return "while it runs"


def succeed() -> str:
    """A job: notes what stands in Redis while it runs."""
    job = get_current_job()
    assert job is not None
    (execution,) = job.get_executions()
    snapshots.append(shape(job.connection, execution.id))
    return "answer"


def break_down() -> None:
    """A job that fails."""
    raise ValueError("wrong")


def on_stock_rq(connection: redis.Redis, function: Any) -> tuple[Shape, Shape]:
    """The keys before and after one job on RQ's own worker."""
    queue = Queue("gpu", connection=connection)
    queue.enqueue(function, job_id="same", result_ttl=1000, failure_ttl=2000)
    waiting = shape(connection)
    Quiet([queue], connection=connection, name="w1").work(burst=True)
    return waiting, shape(connection)


@pytest.fixture
def hand(pool: Pool) -> Hand:
    """A worker that is registered as RQ's own."""
    worker = Worker(["gpu"], connection=pool.connection, name="w1")
    worker.register_birth()
    return Hand(pool)


def assert_same(ours: Shape, stock: Shape) -> None:
    """The same keys of the same types and expiries; job hashes may have more of ours."""
    assert set(ours) == set(stock)
    for name, (kind, content, ttl) in stock.items():
        our_kind, our_content, our_ttl = ours[name]
        assert (our_kind, our_ttl) == (kind, ttl), name
        if name == key("job", "same"):
            assert our_content - OUR_FIELDS == content - OUR_FIELDS, name
        else:
            assert our_content == content, name


def test_a_waiting_request_looks_like_a_waiting_job(pool: Pool):
    """After enqueue: the same keys, the same fields."""
    stock, _ = on_stock_rq(pool.connection, succeed)
    pool.connection.flushall()
    pool.submit("same")
    assert_same(shape(pool.connection), stock)


def test_a_finished_request_looks_like_a_finished_job(pool: Pool):
    """After finish: the same keys, fields, entry of the result stream and TTLs."""
    _, stock = on_stock_rq(pool.connection, succeed)
    pool.connection.flushall()
    hand = Hand(pool)
    pool.submit("same")
    hand.finish(hand.take("same"), "answer")
    assert_same(shape(pool.connection), stock)


def test_a_failed_request_looks_like_a_failed_job(pool: Pool):
    """After a dead letter: the same keys, fields, entry of the result stream and TTLs."""
    _, stock = on_stock_rq(pool.connection, break_down)
    pool.connection.flushall()
    hand = Hand(pool)
    pool.submit("same")
    hand.fail(hand.take("same"), FailureKind.INVALID_REQUEST)
    assert_same(shape(pool.connection), stock)


def test_a_running_request_looks_like_a_running_job(pool: Pool):
    """From the first renewal to the end: the same keys and fields, so that viewers show who runs what."""
    snapshots.clear()
    on_stock_rq(pool.connection, succeed)
    (stock,) = snapshots
    pool.connection.flushall()
    hand = Hand(pool)
    pool.submit("same")
    claim = hand.take("same")
    assert StartedJobRegistry("gpu", connection=pool.connection).get_job_ids() == ["same"]
    assert hand.renew(claim) == "ok"
    assert_same(shape(pool.connection, claim.execution), stock)


def test_the_comparison_can_fail(pool: Pool):
    """A missing field, a missing key, another expiry: each is seen."""
    _, stock = on_stock_rq(pool.connection, succeed)
    name = key("job", "same")
    kind, fields, ttl = stock[name]
    for drifted in (
        {**stock, name: (kind, fields - {"enqueued_at"}, ttl)},
        {**stock, name: (kind, fields, "none")},
        {other: value for other, value in stock.items() if other != name},
        {**stock, key("results", "same"): ("stream", [{"type"}], ttl)},
    ):
        with pytest.raises(AssertionError):
            assert_same(drifted, stock)


def test_the_release_of_rq_is_the_one_that_was_looked_at():
    """The scripts write RQ's keys: another release has to be looked at first."""
    assert version("rq").startswith("3.0.")


# --- RQ's tools on ours ------------------------------------------------------------------------------


def command(url: str, *arguments: str) -> str:
    """Run RQ's own command; its output."""
    path = str(Path(sys.executable).with_name("rq"))
    return subprocess.run(
        [path, *arguments, "--url", url], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_rq_info_shows_requests_and_workers(pool: Pool, hand: Hand, redis_url: str):
    """The real command: counts by state, the worker and that it is busy."""
    pool.submit("finished", "failed", "runs", "waits", "waits-too")
    first, second, _ = hand.claim(3).claims
    hand.beat()
    hand.finish(first, 1)
    hand.fail(second, FailureKind.INVALID_REQUEST)
    shown = command(redis_url, "info", "--raw")
    assert "queue gpu 2" in shown
    assert re.search(r"worker w1 .*busy.* gpu", shown)
    table = command(redis_url, "info")
    assert "1 executing, 1 finished, 1 failed" in table
    # It has cleaned up by the way, and has left what runs alone.
    assert StartedJobRegistry("gpu", connection=pool.connection).get_job_ids(cleanup=False) == ["runs"]


def test_a_job_of_ours_reads_as_any_job(pool: Pool, hand: Hand):
    """Job.fetch, return_value, latest_result, description, dates; the data is a call of plain strings."""
    pool.submit("a", "b")
    first, second = hand.claim(2).claims
    running = Job.fetch("a", connection=pool.connection)
    assert running.is_started
    assert running.worker_name == "w1"
    hand.finish(first, {"n": [1, None, "ü"]})
    hand.finish(second, None)
    job = Job.fetch("a", connection=pool.connection, serializer=RestrictedPickle)
    assert job.is_finished
    assert job.return_value() == {"n": [1, None, "ü"]}
    assert job.description == "app.tasks.count(a)"
    assert (job.func_name, list(job.args), job.kwargs) == (STOCK_FUNCTION, ["app.tasks.count"], {})
    dates = [date for date in (job.created_at, job.enqueued_at, job.started_at, job.ended_at) if date]
    assert len(dates) == 4
    assert dates == sorted(dates)
    result = job.latest_result()
    assert result is not None
    assert (result.type, result.worker_name, result.execution_id) == (Result.Type.SUCCESSFUL, "w1", first.execution)
    assert Job.fetch("a", connection=pool.connection).return_value() == {"n": [1, None, "ü"]}
    assert Job.fetch("b", connection=pool.connection).return_value() is None
    assert sorted(FinishedJobRegistry("gpu", connection=pool.connection).get_job_ids()) == ["a", "b"]


def test_workers_show_what_they_execute(pool: Pool, hand: Hand):
    """Worker.all: all of a batch, and nothing once it has ended; counts are kept."""
    pool.submit("a", "b")
    claims = hand.claim(2).claims
    hand.beat()
    assert hand.renew(claims[0]) == "ok"
    assert hand.step(claims[1], [1]) == "ok"
    (worker,) = Worker.all(connection=pool.connection)
    assert worker.get_state() == "busy"
    executions = worker.get_current_executions()
    assert {(item.job_id, item.id, item.worker_name) for item in executions} == {
        (claim.id, claim.execution, "w1") for claim in claims
    }
    current = worker.get_current_job()
    assert current is not None
    assert current.id in ("a", "b")
    hand.finish(claims[0], 1)
    hand.fail(claims[1], FailureKind.INVALID_REQUEST)
    (worker,) = Worker.all(connection=pool.connection)
    assert (worker.get_state(), worker.get_current_executions()) == ("idle", [])
    assert (worker.successful_job_count, worker.failed_job_count) == (1, 1)
    assert worker.total_working_time == pytest.approx(0.5)


def test_the_rq_requeue_command_revives_dead_letters(pool: Pool, hand: Hand, redis_url: str):
    """`rq requeue --all`: back in the queue, out of the registry, and to be run."""
    pool.submit("a", "b")
    for claim in hand.claim(2).claims:
        hand.fail(claim, FailureKind.INVALID_REQUEST)
    registry = FailedJobRegistry("gpu", connection=pool.connection)
    assert sorted(registry.get_job_ids()) == ["a", "b"]
    assert "Requeueing 2 jobs" in command(redis_url, "requeue", "--queue", "gpu", "--all")
    assert registry.get_job_ids() == []
    claims = hand.claim(2).claims
    assert sorted(claim.id for claim in claims) == ["a", "b"]
    for claim in claims:
        assert hand.finish(claim, "after all") == "ok"
    job = Job.fetch("a", connection=pool.connection)
    assert (job.is_finished, job.return_value()) == (True, "after all")
    assert [result.type for result in job.results()] == [Result.Type.SUCCESSFUL, Result.Type.FAILED]


def test_rqs_clean_up_leaves_running_requests_alone(pool: Pool, hand: Hand):
    """Any viewer triggers it: it must not declare dead what our leases say is alive."""
    pool.submit("a")
    claim = hand.take("a")
    hand.beat()
    hand.renew(claim)
    registry = StartedJobRegistry("gpu", connection=pool.connection)
    registry.cleanup()
    assert registry.get_job_ids() == ["a"]
    scores: Any = pool.connection.zrange(key("wip", "gpu"), 0, -1, withscores=True)
    assert [member for member, _ in scores] == [f"a:{claim.execution}".encode()]
    assert scores[0][1] - pool.now() > 3500
    assert pool.connection.ttl(key("execution", f"a:{claim.execution}")) > 3500
