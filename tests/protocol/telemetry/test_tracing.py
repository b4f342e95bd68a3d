"""Traces: a span for the submit, one for each execution, linked to it whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from perdure.producer import AsyncClient, Client
from perdure.protocol.errors import IdempotencyConflict
from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.protocol.telemetry import tracing
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is traced while the test runs. Only a whole process can set a provider for good."""
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield memory
    provider.shutdown()


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, settings=Settings()) as client:
        yield client


def stored(connection: redis.Redis, identifier: str) -> str:
    value: Any = connection.hget(key("job", identifier), "trace")
    return "" if value is None else str(value.decode())


def context_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


def test_a_submit_is_a_span_whose_context_travels(
    client: Client, connection: redis.Redis, exporter: InMemorySpanExporter
):
    """A child of what the producer does; what a person reads in Redis is W3C's text."""
    with trace.get_tracer("app").start_as_current_span("page") as page:
        handle = client.submit("app.tasks.count", {"n": 3}, queue="gpu")
    span = exporter.get_finished_spans()[0]
    assert (span.name, span.kind, span.parent) == ("send gpu", SpanKind.PRODUCER, page.get_span_context())
    assert dict(span.attributes or {}) == {
        "messaging.system": "rq",
        "messaging.destination.name": "gpu",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.message.id": handle.id,
        "perdure.task": "app.tasks.count",
    }
    assert stored(connection, handle.id) == context_of(span)


def test_many_are_one_span(client: Client, connection: redis.Redis, exporter: InMemorySpanExporter):
    handles = client.submit_many([("app.tasks.count", {"n": n}) for n in range(300)], queue="gpu")
    (span,) = exporter.get_finished_spans()
    assert (span.attributes or {})["messaging.batch.message_count"] == 300
    assert {stored(connection, handle.id) for handle in handles} == {context_of(span)}


def test_a_task_of_an_event_loop_keeps_its_context(
    redis_url: str, connection: redis.Redis, exporter: InMemorySpanExporter
):
    """The call runs in another thread."""

    async def run() -> str:
        async with AsyncClient(redis_url, settings=Settings()) as client:
            with trace.get_tracer("app").start_as_current_span("page"):
                return (await client.submit("app.tasks.count", {"n": 3})).id

    identifier = asyncio.run(run())
    send, page = exporter.get_finished_spans()
    assert send.parent == page.get_span_context()
    assert stored(connection, identifier) == context_of(send)


def test_a_submit_that_fails_says_so_without_its_words(client: Client, exporter: InMemorySpanExporter):
    """The text of an error may hold what the user sent."""
    client.submit("app.tasks.count", {"n": 3}, id="mine")
    with pytest.raises(IdempotencyConflict):
        client.submit("app.tasks.count", {"n": 4}, id="mine")
    _, span = exporter.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "IdempotencyConflict")
    assert (span.attributes or {})["error.type"] == "IdempotencyConflict"


def test_without_an_sdk_nothing_is_stored(client: Client, connection: redis.Redis):
    handle = client.submit("app.tasks.count", {"n": 3})
    assert stored(connection, handle.id) == ""


def test_without_the_package_everything_works(redis_url: str):
    code = f"""
import sys
sys.modules["opentelemetry"] = None
from perdure.producer import Client
with Client({redis_url!r}) as client:
    print(client.submit("app.tasks.count", {{"n": 3}}).status())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "queued\n"


def test_an_execution_s_span_tells_what_came_of_it(connection: redis.Redis, exporter: InMemorySpanExporter):
    """Linked to the submit, child of nobody; the execution that a worker lost is told by the next one's."""
    pool = Pool.over(connection)
    first, second = Hand(pool, "w1"), Hand(pool, "w2")
    with Client(connection=connection, settings=Settings()) as client:
        handle = client.submit("app.tasks.count", {"n": 3}, queue="gpu")
    claim = first.take(handle.id)
    first.step(claim, ["x", "y"])
    pool.reap(first.incarnation)
    again = second.take(handle.id)
    with trace.get_tracer("app").start_as_current_span("something else"):
        tracing.lost(again)
        tracing.processed(again, seconds=2.5, outcome="failed", kind="UNKNOWN", outputs=1, checkpoints=4, worker="w2")
    send, before, now, _ = exporter.get_finished_spans()
    for span in (before, now):
        assert (span.name, span.kind, span.parent) == ("process gpu", SpanKind.CONSUMER, None)
        assert [link.context.span_id for link in span.links] == [send.context.span_id if send.context else 0]
        assert span.status.status_code is StatusCode.ERROR
    told = dict(before.attributes or {})
    assert (told["perdure.execution"], told["perdure.worker"], told["perdure.outcome"], told["error.type"]) == (
        claim.execution,
        "w1",
        "lost",
        "WORKER_LOST",
    )
    told = dict(now.attributes or {})
    assert (told["perdure.execution"], told["perdure.outputs"], told["error.type"]) == (again.execution, 1, "UNKNOWN")
    (event,) = now.events
    assert (event.name, dict(event.attributes or {})) == (
        "resumed",
        {"perdure.offset": 2, "perdure.reason": "WORKER_LOST"},
    )
    assert now.end_time is not None
    assert now.start_time is not None
    assert now.end_time - now.start_time == pytest.approx(2.5e9)


def test_a_trace_that_is_none_links_to_nothing(connection: redis.Redis, exporter: InMemorySpanExporter):
    pool = Pool.over(connection)
    pool.submit("a")
    connection.hset(key("job", "a"), "trace", "not-a-trace \xff")
    tracing.processed(Hand(pool).take("a"), seconds=1, outcome="finished")
    (span,) = exporter.get_finished_spans()
    assert not span.links


@pytest.mark.slow
def test_executions_before_and_after_a_kill_share_a_submit(lab: Lab, tmp_path: Path, exporter: InMemorySpanExporter):
    """kill -9 takes the span along; whoever goes on makes it."""
    spans = tmp_path / "spans"
    environment = {"TRACE_FILE": str(spans)}
    first = lab.worker(environment=environment)
    with Client(lab.url, settings=Settings()) as client:
        handle = client.submit("traced_tasks.gate", {"folder": str(lab.folder)}, queue="gpu")
    lab.moved(handle.id, 3)
    first.kill()
    second = lab.worker(environment=environment)
    (lab.folder / "open").touch()
    lab.check(handle.id, 6)
    rows = eventually(lambda: len(lines := spans.read_text().splitlines()) == 2 and lines)
    (send,) = exporter.get_finished_spans()
    assert send.context is not None
    found = [json.loads(row) for row in rows or []]
    assert [row["name"] for row in found] == ["process gpu", "process gpu"]
    assert [row["attributes"]["perdure.worker"] for row in found] == [first.name, second.name]
    assert [row["attributes"]["perdure.outcome"] for row in found] == ["lost", "finished"]
    assert len({row["attributes"]["perdure.execution"] for row in found}) == 2
    for row in found:
        (link,) = row["links"]
        assert link["context"]["span_id"] == f"0x{send.context.span_id:016x}"
        assert row["parent_id"] is None
