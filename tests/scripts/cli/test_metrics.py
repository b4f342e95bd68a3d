"""``perdure metrics``: what is served is what is in Redis, and asking costs the same however much that is."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from perdure.protocol.keys import key
from perdure.protocol.queries.census import HEAD, Surveyor
from perdure.protocol.records import FailureKind
from perdure.scripts.main import main
from perdure.scripts.pool.server import Server
from perdure.scripts.present.exposition import METRICS, PoolCollector
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.scripts.exporter import exporter, get

Page = dict[str, dict[tuple[str, ...], float]]


def parse(text: str) -> Page:
    """Sample name -> values of its labels (in the order of their names in METRICS, bounds last) -> value."""
    page: Page = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name if sample.name in METRICS else re.sub(r"_(bucket|count|sum)$", "", sample.name)
            order = [*METRICS[name].labels, *(["le"] if sample.name.endswith("_bucket") else [])]
            page.setdefault(sample.name, {})[tuple(sample.labels[label] for label in order)] = sample.value
    return page


def served(connection: redis.Redis, **limits: int) -> Page:
    registry = CollectorRegistry()
    registry.register(PoolCollector(Surveyor(connection, **limits)))
    return parse(generate_latest(registry).decode())


def test_an_empty_server_is_a_pool_at_rest(connection: redis.Redis):
    """No queue, no worker, no error; every name is there with its type."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(Surveyor(connection)))
    text = generate_latest(registry).decode()
    page = parse(text)
    assert page["perdure_redis_up"] == {(): 1}
    assert page["perdure_workers"] == {("ready",): 0, ("loading",): 0}
    assert page["perdure_workers_ended_total"][("CRASH",)] == 0
    assert "perdure_requests_waiting" not in page
    for name, described in METRICS.items():
        assert f"# TYPE {name} {described.kind}\n" in text, name


def test_a_pool_s_numbers_are_those_in_redis(pool: Pool):
    """Submitted, running, waiting, retried, failed and finished requests, a crash and a suspect, each
    where it belongs.
    """
    connection = pool.connection
    hand, other = Hand(pool), Hand(pool, "w2")
    hand.beat()
    other.beat(ready=False)
    pool.submit("done", "bad", "again", "crashed", "waits", retries=1)
    pool.submit("low", queue="gpu-low")
    done, bad, again, crashed = hand.claim(4).claims
    assert hand.finish(done, outputs=["x", "y"]) == "ok"
    assert hand.fail(bad, FailureKind.INVALID_REQUEST) == "failed"
    assert hand.fail(again) == "scheduled"
    hand.step(crashed, ["x"])
    pool.reap(hand.incarnation, FailureKind.CRASH)
    assert pool.status("crashed") == "scheduled"
    other.take("waits")
    pool.store.measure(other.incarnation, 1, {"bucket:recovery:0.3:gpu:CRASH": 2, "sum:recovery:gpu:CRASH": 500_000})
    page = served(connection)
    gpu = ("gpu",)
    assert page["perdure_requests_submitted_total"] == {gpu: 5, ("gpu-low",): 1}
    assert page["perdure_requests_finished_total"] == {
        ("gpu", "finished"): 1,
        ("gpu", "failed"): 1,
        ("gpu", "canceled"): 0,
        ("gpu-low", "finished"): 0,
        ("gpu-low", "failed"): 0,
        ("gpu-low", "canceled"): 0,
    }
    assert page["perdure_requests_running"][gpu] == 1
    waiting = page["perdure_requests_waiting"]
    assert waiting["gpu-low", "low"] == 1
    assert (
        waiting["gpu", "normal"] + page["perdure_requests_scheduled"][gpu] + page["perdure_requests_running"][gpu] == 3
    )
    assert page["perdure_dead_letters"][gpu] == page["perdure_dead_letters_total"]["gpu", "INVALID_REQUEST"] == 1
    assert page["perdure_dead_letters_total"]["gpu", "UNKNOWN"] == 0
    assert page["perdure_retries_total"] == {("gpu", "UNKNOWN"): 1, ("gpu", "CRASH"): 1}
    assert page["perdure_lease_losses_total"]["gpu", "CRASH"] == 1
    assert page["perdure_workers_ended_total"][("CRASH",)] == 1
    assert page["perdure_suspected_total"][gpu] == 1
    assert page["perdure_workers"] == {("ready",): 0, ("loading",): 1}
    assert page["perdure_checkpoints"] == {(): 1}
    assert page["perdure_recovery_seconds_bucket"]["gpu", "CRASH", "0.2"] == 0
    assert page["perdure_recovery_seconds_bucket"]["gpu", "CRASH", "0.3"] == 2
    assert page["perdure_recovery_seconds_bucket"]["gpu", "CRASH", "+Inf"] == 2
    assert page["perdure_recovery_seconds_sum"] == {("gpu", "CRASH"): 0.5}
    jobs = page["rq_jobs"]
    assert (jobs["gpu", "finished"], jobs["gpu", "failed"], jobs["gpu", "started"]) == (1, 1, 1)


def test_rq_s_own_workers_and_jobs_are_told_as_rq_exporter_does(lab: Lab):
    """A stock worker beside ours."""
    from rq import Queue, SimpleWorker

    job = Queue("plain", connection=lab.connection).enqueue("operator.add", 1, 2)
    worker = SimpleWorker([Queue("plain", connection=lab.connection)], connection=lab.connection, name="stock")
    worker.register_birth()
    assert job.id
    page = served(lab.connection)
    assert page["rq_workers"] == {("stock", "?", "plain"): 1} or page["rq_workers"] == {
        ("stock", "starting", "plain"): 1
    }
    assert page["rq_workers_success_total"] == {("stock", "plain"): 0}
    assert page["rq_jobs"]["plain", "queued"] == 1
    assert page["perdure_requests_submitted_total"] == {("plain",): 0}


def test_the_oldest_is_looked_for_at_the_head_alone(pool: Pool):
    """What was handed back stands in front with a new date; an ended one is nobody who waits."""
    pool.submit("a", "b", "c")
    dates = {"a": "2020-01-01T00:00:00.000000Z", "b": "2026-01-01T00:00:00.000000Z"}
    for name, date in dates.items():
        pool.connection.hset(key("job", name), "enqueued_at", date)
    assert pool.cancel("a") == "canceled"
    age = served(pool.connection)["perdure_oldest_waiting_seconds"]["gpu",]
    pool.connection.lpush(key("queue", "gpu"), *(f"gone-{n}" for n in range(HEAD)))
    beyond = served(pool.connection)["perdure_oldest_waiting_seconds"]["gpu",]
    assert age == pytest.approx(pool.now() - 1_767_225_600, abs=60)
    assert beyond == 0


def test_the_cost_of_a_look_does_not_grow_with_requests(pool: Pool):
    """And none of them is one that walks through what waits."""

    def commands() -> dict[str, int]:
        pool.connection.config_resetstat()
        served(pool.connection)
        stats: Any = pool.connection.info("commandstats")
        return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}

    pool.submit(*(f"r{n}" for n in range(10)))
    few = commands()
    with pool.connection.pipeline(transaction=False) as pipe:
        for start in range(0, 50_000, 1000):
            pipe.rpush(key("queue", "gpu"), *(f"x{n}" for n in range(start, start + 1000)))
            pipe.zadd(key("finished", "gpu"), {f"x{n}": n + 1 for n in range(start, start + 1000)})
        pipe.execute()
    many = commands()
    # Of those that are not there, nothing is read.
    assert many == few
    assert not {"keys", "scan", "hgetall", "zscan", "zrangebyscore"} & {name.partition("|")[0] for name in many}
    assert sum(many.values()) < 80


def test_queues_beyond_the_limit_are_counted(pool: Pool):
    for number in range(5):
        pool.submit(f"a{number}", queue=f"q{number}")
    surveyor = Surveyor(pool.connection, max_queues=3)
    assert (list(surveyor.take().queues), surveyor.take().left_out["queues"]) == (["q0", "q1", "q2"], 2)
    pool.submit("first", queue="a-new-one")
    census = surveyor.take()
    assert (list(census.queues), census.left_out["queues"]) == (["q0", "q1", "q2"], 3)


def test_of_too_many_workers_none_is_told_by_name(pool: Pool):
    """Some of them would look like all."""
    for number in range(3):
        pool.connection.hset(f"rq:worker:w{number}", mapping={"state": "idle", "birth": "x", "queues": "gpu"})
        pool.connection.sadd("rq:workers", f"rq:worker:w{number}")
    assert len(served(pool.connection)["rq_workers"]) == 3
    page = served(pool.connection, max_workers=2)
    assert "rq_workers" not in page
    assert page["perdure_left_out"]["workers",] == 3


def test_what_nobody_of_ours_has_written_breaks_nothing(pool: Pool):
    """Counters of a later release, and damage."""
    pool.submit("a")
    strange = {"bucket:unheard_of:1:gpu": 1, "bucket:recovery:x:gpu:CRASH": 1, "submitted:gpu": "much", b"\xff": 1,
               "bucket:recovery:0.31:gpu:CRASH": 4, "again:gpu": 1, "left:": 2}  # fmt: skip
    pool.connection.hset(key("counters"), mapping=strange)  # type: ignore[arg-type]
    pool.connection.hset(key("job", "a"), "enqueued_at", "soon")
    page = served(pool.connection)
    assert page["perdure_requests_submitted_total"] == {("gpu",): 0}
    # A bound that is not ours counts in the next larger one.
    assert page["perdure_recovery_seconds_bucket"]["gpu", "CRASH", "0.3"] == 0
    assert page["perdure_recovery_seconds_bucket"]["gpu", "CRASH", "0.5"] == 4


def test_a_pretended_server_can_be_asked_too():
    """It knows no INFO: those figures are left out."""
    with fakeredis.FakeRedis() as connection:
        Pool.over(connection).submit("a")
        page = served(connection)
    assert page["perdure_requests_waiting"] == {("gpu", "normal"): 1}


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_serves_through_outages_until_it_is_stopped(server_binary: Path, tmp_path: Path):
    """Redis away is a sample, not an error; the page of its own life knows no Redis."""
    with Server(binary=server_binary, die_with_parent=True) as server:
        with redis.Redis.from_url(server.url) as connection:
            Pool.over(connection).submit("a")
        with exporter(server.url, tmp_path) as (address, process):
            status, kind, text = get(f"{address}/metrics")
            assert (status, kind.partition(";")[0]) == (200, "text/plain")
            assert parse(text)["perdure_requests_submitted_total"] == {("gpu",): 1}
            assert "openmetrics" in get(f"{address}/metrics", Accept="application/openmetrics-text; version=1.0.0")[1]
            assert get(f"{address}/livez")[0] == 200
            assert get(f"{address}/else")[0] == 404
            server.kill()
            eventually(lambda: parse(get(f"{address}/metrics")[2])["perdure_redis_up"] == {(): 0})
            assert "perdure_requests_submitted_total" not in parse(get(f"{address}/metrics")[2])
            assert get(f"{address}/livez")[0] == 200
            server.restart()
            eventually(lambda: parse(get(f"{address}/metrics")[2])["perdure_redis_up"] == {(): 1})
            process.send(signal.SIGTERM)
            assert process.end() == 0


def test_once_prints_and_ends(pool: Pool, redis_url: str, capsys: pytest.CaptureFixture[str]):
    pool.submit("a")
    assert main(["metrics", "--once", "--url", redis_url]) == 0
    assert parse(capsys.readouterr().out)["perdure_requests_submitted_total"] == {("gpu",): 1}


def test_a_port_that_is_taken_is_a_mistake_in_the_call(redis_url: str, capsys: pytest.CaptureFixture[str]):
    port = redis_url.rpartition(":")[2].partition("/")[0]
    assert main(["metrics", "--port", port, "--url", redis_url]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
