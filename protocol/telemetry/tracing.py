"""Traces, by OpenTelemetry's API alone: a span for each submit, and one for each execution, linked to it.

Without the package ``opentelemetry-api`` (extra ``otel``), or without an SDK that somebody has set up, nothing is made
and nothing costs anything. The SDK, its exporters and its sampling are the user's.

The submit's context travels with the request, in the field ``trace`` of its hash: W3C's ``traceparent``, and
``tracestate`` after a space. A ``process`` span is linked, not a child: it may begin a day after the submit has ended,
and again after each loss. It is made when the execution ends. A killed worker cannot make its last one: whoever goes on
does it for it, from what Redis knows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from ..records import NewRequest

if TYPE_CHECKING:
    from ..transitions.calls import Claim

# OpenTelemetry's names for messaging and generation are not stable yet: they stand here, and nowhere else.
SYSTEM: Final = "messaging.system"
DESTINATION: Final = "messaging.destination.name"
OPERATION: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGE: Final = "messaging.message.id"
BATCH: Final = "messaging.batch.message_count"
ERROR_TYPE: Final = "error.type"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"

EXECUTION: Final = "perdure.execution"
ATTEMPT: Final = "perdure.attempt"
WORKER: Final = "perdure.worker"
TASK: Final = "perdure.task"
OUTCOME: Final = "perdure.outcome"
OUTPUTS: Final = "perdure.outputs"
CHECKPOINTS: Final = "perdure.checkpoints"
OFFSET: Final = "perdure.offset"
REASON: Final = "perdure.reason"
RESUMED: Final = "resumed"
"""Name of the event at the beginning of an execution that goes on from a checkpoint."""

GENERATE: Final = "perdure.workers.text.generate"
"""The task whose outputs are tokens."""


@cache
def _api() -> Any:
    """The package, imported when something is first to be traced; ``None`` without it."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace


def _tracer() -> Any:
    """A tracer, or ``None`` as long as nobody has set up an SDK."""
    api = _api()
    if api is None or isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return None
    return api.get_tracer("perdure")


@contextmanager
def sending(requests: Sequence[NewRequest]) -> Iterator[list[NewRequest]]:
    """The span ``send QUEUE`` around a submit; gives the requests with its context in them.

    It is not made the current one, since a submit may be left and entered again. Without an SDK the current context
    travels all the same, if there is one.
    """
    if _api() is None or not requests:
        yield list(requests)
        return
    tracer = _tracer()
    if tracer is None:
        trace = _inject(None)
        yield [replace(request, trace=trace) for request in requests] if trace else list(requests)
        return
    queues = {request.queue for request in requests}
    attributes: dict[str, Any] = {SYSTEM: "rq", OPERATION: "send", OPERATION_TYPE: "send"}
    if len(queues) == 1:
        attributes[DESTINATION] = requests[0].queue
    if len(requests) == 1:
        attributes |= {MESSAGE: requests[0].id, TASK: requests[0].task}
    else:
        attributes[BATCH] = len(requests)
    name = f"send {requests[0].queue}" if len(queues) == 1 else "send"
    span = tracer.start_span(name, kind=_api().SpanKind.PRODUCER, attributes=attributes)
    try:
        trace = _inject(span)
        yield [replace(request, trace=trace) for request in requests] if trace else list(requests)
    except BaseException as error:
        span.set_attribute(ERROR_TYPE, type(error).__name__)
        span.set_status(_api().StatusCode.ERROR, type(error).__name__)  # a message may hold what nobody should read
        raise
    finally:
        span.end()


def processed(
    claim: Claim,
    *,
    seconds: float,
    outcome: str,
    kind: str = "",
    outputs: int = 0,
    checkpoints: int = 0,
    worker: str = "",
) -> None:
    """Make the span ``process QUEUE`` of an execution that has ended just now, ``seconds`` after its claim.

    ``kind``: that of the failure, if it is one.
    """
    tracer = _tracer()
    if tracer is None or claim.plain:
        return
    end = time.time_ns()
    attributes = _execution(claim, claim.execution, worker, outcome) | {
        ATTEMPT: claim.attempt, OUTPUTS: outputs, CHECKPOINTS: checkpoints,
    }  # fmt: skip
    if claim.task == GENERATE:
        attributes[OUTPUT_TOKENS] = outputs
    start = end - round(seconds * 1e9)
    span = _started(tracer, claim, attributes, start)
    if claim.seq:
        why = claim.interruption.kind if claim.interruption else "UNKNOWN"
        span.add_event(RESUMED, {OFFSET: claim.offset, REASON: why}, timestamp=start)
    if kind:
        _failed(span, kind)
    span.end(end)


def lost(claim: Claim) -> None:
    """Make the span of the execution before this one, if it was taken from a worker that could not make it.

    By the server's clock, which may differ from this host's.
    """
    before = claim.interruption
    tracer = _tracer()
    if tracer is None or before is None or not before.taken:
        return
    attributes = _execution(claim, before.execution, before.worker, "lost")
    span = _started(tracer, claim, attributes, round(before.began * 1e9))
    _failed(span, before.kind)
    span.end(round(before.ended * 1e9))


def _execution(claim: Claim, execution: str, worker: str, outcome: str) -> dict[str, Any]:
    return {
        SYSTEM: "rq", DESTINATION: claim.queue, OPERATION: "process", OPERATION_TYPE: "process", MESSAGE: claim.id,
        TASK: claim.task, EXECUTION: execution, WORKER: worker, OUTCOME: outcome,
    }  # fmt: skip


def _started(tracer: Any, claim: Claim, attributes: dict[str, Any], start: int) -> Any:
    from opentelemetry.context import Context

    api = _api()
    submitted = _extract(claim.trace)
    links = [api.Link(submitted)] if submitted is not None else []
    # In an empty context: whatever runs in this thread is not what it belongs to.
    return tracer.start_span(
        f"process {claim.queue}",
        context=Context(),
        kind=api.SpanKind.CONSUMER,
        attributes=attributes,
        links=links,
        start_time=start,
    )


def _failed(span: Any, kind: str) -> None:
    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(_api().StatusCode.ERROR, kind)


def _inject(span: Any) -> str:
    """The context of a span, or the current one, as it is stored; empty if there is none."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    context = None if span is None else _api().set_span_in_context(span)
    TraceContextTextMapPropagator().inject(carrier, context=context)
    return " ".join(carrier[name] for name in ("traceparent", "tracestate") if carrier.get(name))


def _extract(trace: str) -> Any:
    """The stored context, or ``None`` if it is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent, _, state = trace.partition(" ")
    carrier = {"traceparent": parent, "tracestate": state}
    context = TraceContextTextMapPropagator().extract(carrier, context=Context())
    found = _api().get_current_span(context).get_span_context()
    return found if found.is_valid else None
