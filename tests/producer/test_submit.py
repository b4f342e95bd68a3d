"""Submitting: what is refused before anything is stored, and what a lost reply does not do."""

from __future__ import annotations

import math
import os
import pickle
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from rq.job import Job

from perdure.producer import Client, Handle
from perdure.producer.submission import chunks
from perdure.protocol.codec import RestrictedPickle, unpack
from perdure.protocol.connection import connect
from perdure.protocol.errors import (
    DeadlineExceeded,
    DurabilityUnavailable,
    IdempotencyConflict,
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    RedisUnavailable,
    TryAgainLater,
    UnknownRequest,
    UnknownTask,
    UsageError,
)
from perdure.protocol.keys import key
from perdure.protocol.records import NewRequest
from perdure.protocol.settings import Settings
from perdure.protocol.states import State
from perdure.protocol.store import Store
from perdure.scripts.pool.server import Server
from perdure.workers.tasks.base import BatchTask, Request, Step, task

PATH = "app.tasks.count"


@task
def count(request: Request) -> Generator[Step, None, None]:
    """A task at the top level of a module."""
    yield Step(output=1)


class Checked(BatchTask):
    """A batch task that completes its payload at submit."""

    def prepare(self, payload: Any) -> Any:
        if payload.get("max_tokens", 1) < 1:
            raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
        return {"seed": 7, **payload}


@pytest.fixture
def client(redis_client: redis.Redis) -> Iterator[Client]:
    with Client(connection=redis_client, settings=Settings()) as client:
        yield client


def stored(connection: redis.Redis, handle: Handle) -> dict[bytes, bytes]:
    fields: Any = connection.hgetall(key("job", handle.id))
    return dict(fields)


# Whoever submits by a dotted path has no use for tasks, and none for RQ or an engine.
PRODUCER = """
import sys
from perdure.producer import Client

with Client(sys.argv[1]) as client:
    (handle,) = client.submit_many([("app.tasks.count", {"n": 3})])
    handle.details()
    client.submit("app.tasks.count", {"n": 3}).cancel()
print(*sys.modules)
"""


def test_a_producer_loads_nothing_of_workers_nor_of_rq(redis_url: str) -> None:
    command = [sys.executable, "-c", PRODUCER, redis_url]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert "perdure.producer.submission" in loaded
    heavy = ("perdure.workers", "perdure.scripts", "rq", "torch", "numpy")
    assert [name for name in loaded if name in heavy or name.startswith(tuple(f"{each}." for each in heavy))] == []


# --- what is stored ------------------------------------------------------------------------------


def test_a_submitted_request_waits_in_its_queue(client: Client, redis_client: redis.Redis) -> None:
    handle = client.submit(PATH, {"n": 3}, queue="gpu", id="mine-1", max_retries=5, result_ttl=1.2, failure_ttl=60)
    assert handle.id == "mine-1"
    assert redis_client.lrange(key("queue", "gpu"), 0, -1) == [b"mine-1"]
    fields = stored(redis_client, handle)
    assert unpack(fields[b"payload"]) == {"n": 3}
    assert (fields[b"task"], fields[b"origin"], fields[b"max_retries"]) == (b"app.tasks.count", b"gpu", b"5")
    assert (fields[b"result_ttl"], fields[b"failure_ttl"]) == (b"2", b"60")
    assert (handle.status(), handle.done(), handle.attempts()) == ("queued", False, 0)


def test_a_task_object_is_submitted_by_its_path(client: Client, redis_client: redis.Redis) -> None:
    handle = client.submit(count, None)
    assert stored(redis_client, handle)[b"task"].decode() == f"{__name__}.count"


@pytest.mark.parametrize("given", [Checked, pytest.param(Checked(), id="anonymous instance")])
def test_a_batch_task_checks_and_completes_the_payload(
    client: Client, redis_client: redis.Redis, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(given, Checked):
        monkeypatch.setitem(globals(), "instance", given)
    assert unpack(stored(redis_client, client.submit(given, {"max_tokens": 2}))[b"payload"]) == {
        "seed": 7,
        "max_tokens": 2,
    }
    with pytest.raises(InvalidRequest) as caught:
        client.submit(given, {"max_tokens": 0})
    assert caught.value.field == "max_tokens"


def test_degraded_overrides_are_checked_as_the_payload_is(client: Client, redis_client: redis.Redis) -> None:
    """Merged, completed and validated at submit; a bad override is the producer's mistake, told to the producer."""
    handle = client.submit(Checked, {"max_tokens": 90, "prompt": "a"}, degraded={"max_tokens": 9})
    fields = stored(redis_client, handle)
    assert unpack(fields[b"payload"]) == {"seed": 7, "max_tokens": 90, "prompt": "a"}
    assert unpack(fields[b"payload_aside"]) == {"seed": 7, "max_tokens": 9, "prompt": "a"}
    assert handle.degraded() is False
    with pytest.raises(InvalidRequest) as caught:
        client.submit(Checked, {"max_tokens": 90}, degraded={"max_tokens": 0})
    assert (caught.value.field, "overrides of degraded" in caught.value.__notes__[0]) == ("max_tokens", True)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        client.submit("perdure.workers.text.generate", {"prompt": "a"}, degraded={"max_tokens": -1})
    (many,) = client.submit_many([{"task": PATH, "payload": {"n": 3}}], degraded={"n": 1}, step_timeout=1.5)
    fields = stored(redis_client, many)
    assert (unpack(fields[b"payload_aside"]), fields[b"step_ms"]) == ({"n": 1}, b"1500")
    assert b"degraded" not in stored(redis_client, client.submit(PATH, [1], degraded={}))


def test_many_requests_keep_their_order_and_options(client: Client, redis_client: redis.Redis) -> None:
    items: list[Any] = [(PATH, index) for index in range(300)]
    items.append({"task": PATH, "payload": "last", "queue": "other", "id": "last", "max_retries": 0})
    handles = client.submit_many(items, queue="gpu", result_ttl=timedelta(hours=1))
    assert [handle.id.encode() for handle in handles[:-1]] == redis_client.lrange(key("queue", "gpu"), 0, -1)
    assert redis_client.lrange(key("queue", "other"), 0, -1) == [b"last"]
    assert stored(redis_client, handles[-1])[b"result_ttl"] == b"3600"
    assert client.submit_many([]) == []


def test_calls_are_cut_by_number_and_by_bytes() -> None:
    def request(size: int) -> NewRequest:
        return NewRequest(
            id="x",
            nonce="n",
            queue="q",
            task=PATH,
            payload=bytes(size),
            max_retries=0,
            result_ttl=1,
            failure_ttl=1,
            description="",
        )

    assert [len(chunk) for chunk in chunks([request(1)] * 300)] == [128, 128, 44]
    mib = 1024 * 1024
    assert [len(chunk) for chunk in chunks([request(3 * mib)] * 5)] == [2, 2, 1]
    assert [len(chunk) for chunk in chunks([request(1), request(20 * mib), request(1)])] == [1, 1, 1]


# --- bad input -----------------------------------------------------------------------------------

NESTED: Any = []
for _ in range(2000):
    NESTED = [NESTED]

BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "lambda": (lambda: 1, {}, {}, UnknownTask, "is not a task"),
    "function": (len, {}, {}, UnknownTask, "is not a task"),
    "number": (5, {}, {}, UnknownTask, "is not a task"),
    "base class": (BatchTask, {}, {}, UnknownTask, "is not a task"),
    "word": ("count", {}, {}, UsageError, "dotted path"),
    "spaces": ("app.tasks.count me", {}, {}, UsageError, "dotted path"),
    "empty path": ("", {}, {}, UsageError, "dotted path"),
    "our own, missing": ("perdure.workers.nothing.here", {}, {}, UnknownTask, "cannot import"),
    "our own, no task": ("perdure.protocol.tasks.path_of", {}, {}, UnknownTask, "not a task"),
    "object": (PATH, {"a": [1, object()]}, {}, InvalidRequest, r"payload\['a'\]\[1\] is an object"),
    "set": (PATH, {1, 2}, {}, InvalidRequest, "payload is a set"),
    "large int": (PATH, {"n": 2**70}, {}, InvalidRequest, "64 bits"),
    "surrogate": (PATH, "\ud800", {}, InvalidRequest, "surrogate"),
    "nested": (PATH, NESTED, {}, InvalidRequest, "nested"),
    "over-size": (PATH, "x" * 2000, {}, PayloadTooLarge, "more than the limit of 1,000"),
    "queue, long": (PATH, {}, {"queue": "x" * 501}, InvalidRequest, "queue name"),
    "queue, half a character": (PATH, {}, {"queue": "a\ud800"}, InvalidRequest, "queue name"),
    "queue, empty": (PATH, {}, {"queue": ""}, InvalidRequest, "queue name"),
    "queue, number": (PATH, {}, {"queue": 7}, InvalidRequest, "queue name"),
    "id, slash": (PATH, {}, {"id": "a/b"}, InvalidRequest, "request id"),
    "id, umlaut": (PATH, {}, {"id": "ä"}, InvalidRequest, "request id"),
    "id, empty": (PATH, {}, {"id": ""}, InvalidRequest, "request id"),
    "id, long": (PATH, {}, {"id": "x" * 201}, InvalidRequest, "request id"),
    "priority": (PATH, {}, {"priority": "urgent"}, InvalidRequest, "'high', 'normal' or 'low'"),
    "priority, list": (PATH, {}, {"priority": ["high"]}, InvalidRequest, "'high', 'normal' or 'low'"),
    "priority twice": (PATH, {}, {"queue": "gpu-low", "priority": "high"}, InvalidRequest, "already names a priority"),
    "priority, long": (PATH, {}, {"queue": "x" * 498, "priority": "high"}, InvalidRequest, "queue name"),
    "delay": (PATH, {}, {"delay": -1}, InvalidRequest, "delay must be a number of seconds"),
    "delay nan": (PATH, {}, {"delay": math.nan}, InvalidRequest, "delay must be a number of seconds"),
    "delay, text": (PATH, {}, {"delay": "1 s"}, InvalidRequest, "delay must be a number of seconds"),
    "deadline": (PATH, {}, {"deadline": 0}, InvalidRequest, "deadline must be a number of seconds"),
    "deadline, past": (PATH, {}, {"deadline": -5}, InvalidRequest, "deadline must be a number of seconds"),
    "deadline, bool": (PATH, {}, {"deadline": True}, InvalidRequest, "deadline must be a number of seconds"),
    "deadline, text": (PATH, {}, {"deadline": "1 s"}, InvalidRequest, "deadline must be a number of seconds"),
    "deadline, naive": (PATH, {}, {"deadline": datetime(2040, 1, 1)}, InvalidRequest, "has no time zone"),
    "queue_timeout": (PATH, {}, {"queue_timeout": 0}, InvalidRequest, "queue_timeout must be a number of seconds"),
    "durable": (PATH, {}, {"durable": 1}, InvalidRequest, "durable must be True or False"),
    "meta": (PATH, {}, {"meta": [1]}, InvalidRequest, "meta must be a dict"),
    "meta, key": (PATH, {}, {"meta": {1: 2}}, InvalidRequest, "meta must be a dict"),
    "meta, object": (PATH, {}, {"meta": {"a": object()}}, InvalidRequest, r"meta\['a'\] is an object"),
    "meta, large": (PATH, {}, {"meta": {"a": "x" * 70_000}}, PayloadTooLarge, "the meta has"),
    "step_timeout": (PATH, {}, {"step_timeout": 0}, InvalidRequest, "step_timeout must be a number of seconds"),
    "step_timeout, short": (PATH, {}, {"step_timeout": 0.1}, InvalidRequest, r"step_timeout .* at least 0\.2"),
    "step_timeout, text": (
        PATH,
        {},
        {"step_timeout": "1 s"},
        InvalidRequest,
        "step_timeout must be a number of seconds",
    ),
    "degraded": (PATH, {}, {"degraded": [1]}, InvalidRequest, "degraded must be a dict of fields"),
    "degraded, key": (PATH, {}, {"degraded": {1: 2}}, InvalidRequest, "degraded must be a dict of fields"),
    "degraded, payload": (PATH, [1], {"degraded": {"n": 2}}, InvalidRequest, "must be a dict, but is a list"),
    "degraded, object": (PATH, {}, {"degraded": {"a": object()}}, InvalidRequest, r"payload\['a'\] is an object"),
    "degraded, large": (PATH, {}, {"degraded": {"a": "x" * 2000}}, PayloadTooLarge, "the degraded payload has"),
    "key and id": (PATH, {}, {"id": "a", "idempotency_key": "b"}, InvalidRequest, "either an id or"),
    "key, empty": (PATH, {}, {"idempotency_key": ""}, InvalidRequest, "idempotency_key"),
    "key, number": (PATH, {}, {"idempotency_key": 7}, InvalidRequest, "idempotency_key"),
    "key, long": (PATH, {}, {"idempotency_key": "x" * 1001}, InvalidRequest, "idempotency_key"),
    "key, object": (PATH, {"a": object()}, {"idempotency_key": "k"}, InvalidRequest, "is an object"),
    "retries": (PATH, {}, {"max_retries": -1}, InvalidRequest, "max_retries"),
    "retries, bool": (PATH, {}, {"max_retries": True}, InvalidRequest, "max_retries"),
    "result_ttl 0": (PATH, {}, {"result_ttl": 0}, InvalidRequest, "result_ttl"),
    "result_ttl nan": (PATH, {}, {"result_ttl": math.nan}, InvalidRequest, "result_ttl"),
    "failure_ttl": (PATH, {}, {"failure_ttl": math.inf}, InvalidRequest, "failure_ttl"),
    "failure_ttl, text": (PATH, {}, {"failure_ttl": "1h"}, InvalidRequest, "failure_ttl"),
}


@pytest.mark.parametrize(("given", "payload", "options", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_is_stored(
    given: Any, payload: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    connection = fakeredis.FakeRedis()
    client = Client(connection=connection, settings=Settings(max_payload=1000))
    with pytest.raises(error, match=text):
        client.submit(given, payload, **options)
    with pytest.raises(error, match=text) as caught:
        client.submit_many([(PATH, 1), {"task": given, "payload": payload, **options}])
    assert "item 1" in caught.value.__notes__[0]
    assert connection.keys() == []


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("text", "an item is"),
        ((PATH,), "an item is"),
        ({"task": PATH}, "no 'payload'"),
        ({"task": PATH, "payload": 1, "queu": "gpu"}, "did you mean 'queue'"),
        ({"task": PATH, "payload": 1, "id": "twice"}, "item 0 has the id twice as well"),
    ],
)
def test_a_bad_item_is_named(client: Client, redis_client: redis.Redis, item: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        client.submit_many([{"task": PATH, "payload": 1, "id": "twice"}, item])
    assert redis_client.keys() == []


def test_an_id_can_be_used_once(client: Client, redis_client: redis.Redis) -> None:
    client.submit(PATH, 1, id="a")
    with pytest.raises(IdempotencyConflict, match="the id a "):
        client.submit(PATH, 1, id="a")
    with pytest.raises(IdempotencyConflict, match="the id a "):
        client.submit_many([{"task": PATH, "payload": 1, "id": name} for name in ("a", "b")])
    assert redis_client.lrange(key("queue", "default"), 0, -1) == [b"a", b"b"]


def test_priorities_are_queues(client: Client, redis_client: redis.Redis) -> None:
    handles = [client.submit(PATH, 1, queue="gpu", priority=word) for word in ("low", "normal", "high")]
    handles += client.submit_many(
        [(PATH, 1), {"task": PATH, "payload": 2, "priority": "low"}], queue="gpu", priority="high"
    )
    assert [handle.record().queue for handle in handles] == ["gpu-low", "gpu", "gpu-high", "gpu-high", "gpu-low"]
    assert client.submit(PATH, 1, queue="gpu-high").record().queue == "gpu-high"
    assert len(client.list(queue="gpu").items) == 6
    assert len(client.list(queue="gpu-low").items) == 2
    first = client.list(queue="gpu", limit=2)
    assert len(client.list(queue="gpu", cursor=first.cursor).items) == 4


def test_a_delayed_request_is_scheduled_and_can_be_canceled(client: Client, redis_client: redis.Redis) -> None:
    late = client.submit(PATH, 1, delay=timedelta(hours=1), id="late")
    later = client.submit_many([(PATH, 1)], delay=7200.5)[0]
    assert (late.status(), later.status()) == ("scheduled", "scheduled")
    assert [record.id for record in client.list(status="scheduled").items] == [late.id, later.id]
    assert redis_client.llen(key("queue", "default")) == 0
    due: Any = redis_client.zrange(key("retries", "default"), 0, -1, withscores=True)
    assert due[1][1] - due[0][1] == pytest.approx(3_600_500, abs=60_000)
    assert due[0][1] / 1000 == pytest.approx(time.time() + 3600, abs=60)
    assert late.cancel()
    assert late.status() == "canceled"
    assert redis_client.zcard(key("retries", "default")) == 1
    with pytest.raises(IdempotencyConflict):
        client.submit(PATH, 1, id="late")


def test_a_full_queue_takes_no_more(redis_client: redis.Redis) -> None:
    """Waiting and delayed ones count; another queue, and what is there already, is none of its business."""
    with Client(connection=redis_client, settings=Settings(queue_limit=3)) as client:
        client.submit(PATH, 0, idempotency_key="k")
        client.submit(PATH, 0, delay=60)
        items = [(PATH, 1), (PATH, 2), {"task": PATH, "payload": 3, "queue": "other"}, (PATH, 4)]
        with pytest.raises(QueueFull, match=r"the queue default .* PERDURE_QUEUE_LIMIT allows \(3\)") as many:
            client.submit_many(items)
        assert (many.value.items, many.value.retry_after) == ((1, 3), 1.0)
        assert "2 of 4 requests were stored" in many.value.__notes__[0]
        with pytest.raises(QueueFull) as one:
            client.submit(PATH, 5, id="five")
        copy = pickle.loads(pickle.dumps(one.value))
        assert (copy.items, str(copy)) == ((0,), str(one.value))
        with pytest.raises(UnknownRequest):
            client.get("five").status()
        assert client.submit(PATH, 0, idempotency_key="k").status() == "queued"
        assert client.submit(PATH, 5, priority="high").status() == "queued"
    waiting: Any = redis_client.llen(key("queue", "default"))
    assert waiting == 2
    assert redis_client.zcard(key("retries", "default")) == 1


@pytest.mark.slow
def test_concurrent_producers_never_exceed_the_limit(redis_url: str, connection: redis.Redis) -> None:
    """Processes of their own, each in one go: exactly as many are stored as fit."""
    code = (
        "import sys\n"
        "from perdure.producer import Client\n"
        "from perdure.protocol.errors import QueueFull\n"
        "stored = 0\n"
        "with Client() as client:\n"
        "    sys.stdin.readline()\n"
        "    for index in range(50):\n"
        "        try:\n"
        f"            client.submit_many([({PATH!r}, 1), ({PATH!r}, 2)])\n"
        "            stored += 2\n"
        "        except QueueFull as error:\n"
        "            stored += 2 - len(error.items)\n"
        "print(stored)\n"
    )
    environment = {**os.environ, "PERDURE_REDIS_URL": redis_url, "PERDURE_QUEUE_LIMIT": "101"}
    producers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(4)
    ]
    for producer in producers:
        assert producer.stdin is not None
        producer.stdin.write("go\n")
        producer.stdin.flush()
    outputs = [producer.communicate(timeout=60)[0] for producer in producers]
    assert sum(int(output) for output in outputs) == 101
    assert connection.llen(key("queue", "default")) == 101


def test_meta_is_rqs_meta(client: Client, redis_client: redis.Redis) -> None:
    """Of plain values only: the pickle names no class, whatever was given."""
    handle = client.submit(PATH, 1, meta={"user": "ä", "tags": (1, 2), "word": State.QUEUED})
    job = Job.fetch(handle.id, connection=redis_client, serializer=RestrictedPickle)
    assert job.meta == {"user": "ä", "tags": [1, 2], "word": "queued"}
    assert b"meta" not in stored(redis_client, client.submit(PATH, 1, meta={}))


def test_a_durable_submit_waits_for_the_disk(server_binary: Path, tmp_path: Path) -> None:
    """WAITAOF on the connection that wrote, also when the request was stored by an earlier call."""
    with Server(tmp_path, binary=server_binary, die_with_parent=True) as server, connect(server.url) as connection:
        if tuple(int(part) for part in connection.info("server")["redis_version"].split(".")[:2]) < (7, 2):
            pytest.skip("WAITAOF came with Redis 7.2")
        with Client(server.url, settings=Settings()) as client:
            calls: Any = connection.info("commandstats").get("cmdstat_waitaof")
            assert calls is None
            first = client.submit(PATH, 1, durable=True, idempotency_key="k")
            assert client.submit(PATH, 1, durable=True, idempotency_key="k") == first
            others = client.submit_many([(PATH, 1), {"task": PATH, "payload": 2, "durable": True}])
            assert connection.info("commandstats")["cmdstat_waitaof"]["calls"] == 3
            server.kill()
            server.restart()
            assert [client.get(handle.id).status() for handle in (first, *others)] == ["queued"] * 3


def test_missing_durability_is_told_and_the_request_is_stored(redis_url: str) -> None:
    with connect(redis_url) as connection, Client(redis_url, settings=Settings()) as client:
        aof = connection.config_get("appendonly")["appendonly"]
        connection.config_set("appendonly", "no")
        try:
            with pytest.raises(DurabilityUnavailable, match="stored all the same") as caught:
                client.submit(PATH, 1, durable=True, id="a")
            with pytest.raises(DurabilityUnavailable) as many:
                client.submit_many([{"task": PATH, "payload": 1, "id": name} for name in "bc"], durable=True)
        finally:
            connection.config_set("appendonly", aof)
        assert caught.value.request_ids == ("a",)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert many.value.__notes__ == ["2 of 2 requests were stored"]
        assert [client.get(name).status() for name in "abc"] == ["queued"] * 3
        with pytest.raises(IdempotencyConflict):
            client.submit(PATH, 1, durable=True, id="a")


def test_a_server_without_waitaof_is_told() -> None:
    with Client(connection=fakeredis.FakeRedis(), settings=Settings()) as client:
        with pytest.raises(DurabilityUnavailable, match=r"Redis 7\.2"):
            client.submit(PATH, 1, durable=True, id="a")
        assert client.get("a").status() == "queued"


def test_deadlines_are_stored_by_the_servers_clock(client: Client, redis_client: redis.Redis) -> None:
    date = datetime(2040, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    dated = client.submit(PATH, 1, deadline=date)
    both = client.submit(PATH, 1, deadline=timedelta(minutes=2), queue_timeout=30, delay=20)
    assert int(stored(redis_client, dated)[b"deadline"]) == round(date.timestamp() * 1000)
    fields = stored(redis_client, both)
    assert int(fields[b"queue_deadline"]) - int(fields[b"deadline"]) == -70_000
    scores: Any = redis_client.zrange(key("deadlines", "default"), 0, -1, withscores=True)
    assert dict(scores) == {
        dated.id.encode(): date.timestamp() * 1000,
        both.id.encode(): float(fields[b"queue_deadline"]),
    }
    assert both.cancel()
    assert redis_client.zcard(key("deadlines", "default")) == 1


def test_a_missed_deadline_is_raised_by_the_wait(client: Client, redis_client: redis.Redis) -> None:
    """A date that has passed is no mistake of the call: clocks differ, and the server's decides."""
    handle = client.submit(PATH, 1, deadline=datetime.now(UTC) - timedelta(seconds=5))
    Store(redis_client, Settings()).promote(["default"])
    with pytest.raises(DeadlineExceeded, match="its deadline passed while it waited") as caught:
        handle.result()
    assert caught.value.kind == "DEADLINE"
    job = Job.fetch(handle.id, connection=redis_client)
    assert job.is_failed
    result = job.latest_result()
    assert result is not None
    assert "DEADLINE" in str(result.exc_string)


class Drawing(BatchTask):
    """A batch task whose payload is completed by something else each time."""

    drawn = 0

    def prepare(self, payload: Any) -> Any:
        Drawing.drawn += 1
        return {"seed": Drawing.drawn, **payload}


def test_the_same_key_with_the_same_body_is_the_same_request(client: Client, redis_client: redis.Redis) -> None:
    """The body is what the user wrote: neither a seed that is drawn, nor queue, nor the order of keys, nor its end."""
    first = client.submit(Drawing, {"a": 1, "b": [2]}, idempotency_key="order 7", queue="gpu")
    again = client.submit(Drawing, {"b": (2,), "a": 1}, idempotency_key="order 7", queue="other", max_retries=0)
    assert first == again
    assert re.fullmatch("i[0-9a-f]{39}", first.id)
    assert (
        unpack(stored(redis_client, first)[b"payload"])["seed"]
        == unpack(stored(redis_client, again)[b"payload"])["seed"]
    )
    assert redis_client.lrange(key("queue", "gpu"), 0, -1) == [first.id.encode()]
    assert first.cancel()
    assert client.submit(Drawing, {"a": 1, "b": [2]}, idempotency_key="order 7").status() == "canceled"
    redis_client.delete(key("job", first.id))
    assert client.submit(Drawing, {"a": 2}, idempotency_key="order 7").status() == "queued"


@pytest.mark.parametrize(
    "body", [(PATH, [["a", 1]]), (PATH, {"a": 2}), (PATH, {"a": 1, "b": None}), ("app.other", {"a": 1})]
)
def test_a_key_with_another_body_is_a_conflict(client: Client, redis_client: redis.Redis, body: Any) -> None:
    client.submit(PATH, {"a": 1}, idempotency_key="k")
    with pytest.raises(IdempotencyConflict, match="idempotency_key 'k'"):
        client.submit(*body, idempotency_key="k")
    assert redis_client.llen(key("queue", "default")) == 1


def test_a_key_may_stand_twice_in_one_call(client: Client, redis_client: redis.Redis) -> None:
    same: Any = {"task": PATH, "payload": 1, "idempotency_key": "k"}
    handles = client.submit_many([same, (PATH, 2), same])
    assert handles[0] == handles[2]
    assert redis_client.llen(key("queue", "default")) == 2
    with pytest.raises(IdempotencyConflict, match="item 0 has the same idempotency_key"):
        client.submit_many([{**same, "idempotency_key": "l"}, {**same, "payload": 3, "idempotency_key": "l"}])
    with pytest.raises(IdempotencyConflict, match=handles[0].id):
        client.submit_many([{**same, "payload": 3}])


def test_a_key_is_kept_apart_from_an_id(client: Client) -> None:
    """Whoever chooses an id that a key has made does not get the other one's request."""
    handle = client.submit(PATH, 1, idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        client.submit(PATH, 1, id=handle.id)


def test_threads_with_one_key_make_one_request(client: Client, redis_client: redis.Redis) -> None:
    with ThreadPoolExecutor(8) as threads:
        handles = set(threads.map(lambda _: client.submit(PATH, 1, idempotency_key="k"), range(40)))
    assert len(handles) == 1
    assert redis_client.llen(key("queue", "default")) == 1


def test_a_connection_that_decodes_is_refused() -> None:
    with pytest.raises(UsageError, match="decode_responses"):
        Client(connection=fakeredis.FakeRedis(decode_responses=True))


def test_a_url_and_a_connection_are_too_much() -> None:
    with pytest.raises(UsageError, match="not both"):
        Client("redis://localhost", connection=fakeredis.FakeRedis())


def test_a_closed_client_says_so(client: Client) -> None:
    handle = client.submit(PATH, 1)
    client.close()
    client.close()
    for call in (lambda: client.submit(PATH, 1), handle.status, handle.result):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_memory_that_is_full_is_told_and_nothing_is_stored(connection: redis.Redis) -> None:
    """And nobody connects anew for it: what is refused may be tried by thousands."""
    connection.config_set("maxmemory", 1)
    try:
        with Client(connection=connection) as client:
            connections = []
            for _ in range(5):
                with pytest.raises(TryAgainLater, match="maxmemory"):
                    client.submit(PATH, 1)
                connections.append(connection.info("stats")["total_connections_received"])
        assert len(set(connections)) == 1
    finally:
        connection.config_set("maxmemory", 0)
    assert connection.keys() == []


# --- handles -------------------------------------------------------------------------------------


def test_a_handle_is_its_id(client: Client) -> None:
    handle = client.submit(PATH, 1, id="a")
    copy = pickle.loads(pickle.dumps(handle))
    assert (copy, hash(copy), copy.id, repr(copy)) == (handle, hash(handle), "a", "<Handle a>")
    with pytest.raises(UsageError, match=r"client.get\('a'\)"):
        copy.status()
    assert client.get(copy.id).status() == "queued"


def test_an_unknown_request_is_told_when_it_is_asked_about(client: Client) -> None:
    handle = client.get("nobody")
    for ask in (handle.status, handle.result, handle.cancel, handle.outputs, lambda: list(handle.stream())):
        with pytest.raises(UnknownRequest, match="no request nobody") as caught:
            ask()
    assert isinstance(caught.value, LookupError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(InvalidRequest):
        client.get("a b")


def test_producers_import_neither_torch_nor_tasks() -> None:
    code = "import sys, perdure.producer; print([name for name in ('torch', 'perdure.workers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- lost replies and outages --------------------------------------------------------------------


class Proxy:
    """Between a client and the server; on demand it swallows the reply to a command and cuts the connection."""

    def __init__(self, port: int) -> None:
        self.cut = 0
        """How many replies to scripts are still to be hidden."""
        self.hidden = 0
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._serve, args=(near, far), daemon=True).start()

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        doomed = False
        with near, far, suppress(OSError):
            while True:
                ready, _, _ = select.select([near, far], [], [])
                if near in ready:
                    if not (data := near.recv(1 << 20)):
                        return
                    doomed = doomed or (self.cut > 0 and b"EVALSHA" in data)
                    far.sendall(data)
                if far in ready:
                    if not (reply := far.recv(1 << 20)):
                        return
                    if doomed:  # there is a reply: the command was executed
                        self.cut -= 1
                        self.hidden += 1
                        return
                    near.sendall(reply)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # or who waits for the next one would go on to wait
        self._listener.close()


@pytest.fixture
def proxy(redis_url: str) -> Iterator[Proxy]:
    proxy = Proxy(int(redis_url.rpartition(":")[2].partition("/")[0]))
    yield proxy
    proxy.close()


def test_a_submit_whose_reply_is_lost_is_stored_once(proxy: Proxy, connection: redis.Redis) -> None:
    with Client(proxy.url, settings=Settings()) as client:
        client.submit(PATH, 0)  # the script is loaded now
        proxy.cut = 2
        one = client.submit(PATH, 1)
        assert proxy.hidden == 2
        proxy.cut = 1
        many = client.submit_many([(PATH, index) for index in range(3)])
        assert proxy.hidden == 3
    ids = [one.id, *(handle.id for handle in many)]
    assert connection.lrange(key("queue", "default"), 1, -1) == [name.encode() for name in ids]
    assert connection.hget(key("counters"), "submitted:default") == b"5"


def test_a_cancel_whose_reply_is_lost_is_still_a_cancel(proxy: Proxy, connection: redis.Redis) -> None:
    with Client(proxy.url, settings=Settings()) as client:
        client.submit(PATH, 0).cancel()
        handle = client.submit(PATH, 1)
        proxy.cut = 1
        assert handle.cancel()
        assert (proxy.hidden, handle.status()) == (1, "canceled")
    assert connection.zcard(key("canceled", "default")) == 2


def test_a_redis_that_stays_away_is_told_without_its_password() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Client(f"redis://me:s3cret@127.0.0.1:{port}/0", settings=Settings(), patience=0.2) as client:
        for call in (lambda: client.submit(PATH, 1), client.ping, client.list, client.get("a").status):
            with pytest.raises(RedisUnavailable, match=f"redis://me:\\*\\*\\*@127.0.0.1:{port}/0") as caught:
                call()
            assert "s3cret" not in repr(caught.value)
            assert caught.value.__cause__ is None
        with pytest.raises(RedisUnavailable) as caught:
            client.submit_many([(PATH, 1), (PATH, 2)])
        assert "0 of 2 requests were stored" in caught.value.__notes__[0]


def test_a_refused_password_is_told_at_once(connection: redis.Redis, redis_url: str) -> None:
    """Waiting would not help: the patience here is longer than the test may take."""
    url = redis_url.replace("redis://", "redis://nobody:wrong@")
    with Client(url, settings=Settings(), patience=1000) as client, pytest.raises(RedisUnavailable, match="password"):
        client.submit(PATH, 1)


def test_one_client_serves_many_threads(client: Client, redis_client: redis.Redis) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for index in range(20):
                assert client.submit(PATH, index, id=f"t{number}-{index}").status() == "queued"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert redis_client.llen(key("queue", "default")) == 160


@pytest.mark.parametrize("disturbed", ["SCRIPT FLUSH", "CLIENT KILL TYPE normal SKIPME yes"])
def test_what_is_sent_ahead_is_stored_once(
    redis_url: str, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch, disturbed: str
) -> None:
    """The calls of a large submit overlap. One whose answer is lost with the next on its way is sent
    again, in order.
    """
    made: list[int] = []

    def disturbing(parts: Sequence[Sequence[NewRequest]]) -> Iterator[Sequence[NewRequest]]:
        for number, part in enumerate(parts):
            made.append(len(part))
            if number == 2:
                connection.execute_command(*disturbed.split())  # type: ignore[no-untyped-call]
            yield part

    plain = Store.enqueue_in_turn
    monkeypatch.setattr(
        Store, "enqueue_in_turn", lambda self, parts, client="": plain(self, disturbing(parts), client=client)
    )
    with Client(redis_url, settings=Settings()) as client:
        handles = client.submit_many([(PATH, number) for number in range(1000)], queue="gpu")
    assert made[:3] == [128] * 3  # it was on its way
    assert sum(made) > 872  # and some of them a second time
    assert connection.lrange(key("queue", "gpu"), 0, -1) == [handle.id.encode() for handle in handles]


def test_what_is_sent_ahead_meets_the_limit_of_its_queue(redis_url: str, connection: redis.Redis) -> None:
    """Each request is told from the others, whichever call it was in."""
    with Client(redis_url, settings=Settings(queue_limit=300)) as client, pytest.raises(QueueFull) as caught:
        client.submit_many([(PATH, number) for number in range(1000)], queue="gpu")
    assert connection.llen(key("queue", "gpu")) == 300
    assert "300 of 1000 requests were stored" in caught.value.__notes__
