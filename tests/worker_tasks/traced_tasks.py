"""Tasks of a user who has set up OpenTelemetry's SDK: spans go into the file of ``TRACE_FILE``, one line each."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from perdure.workers import Request, Step, task

_FILE = Path(os.environ["TRACE_FILE"]).open("a", encoding="utf-8")  # noqa: SIM115
_provider = TracerProvider()
_provider.add_span_processor(
    SimpleSpanProcessor(ConsoleSpanExporter(out=_FILE, formatter=lambda span: span.to_json(indent=None) + "\n"))
)
trace.set_tracer_provider(_provider)


@task
def gate(request: Request) -> Generator[Step, None, Any]:
    """Put out three, then wait until somebody opens."""
    for index in range(request.state or 0, 6):
        while index == 3 and not Path(request.payload["folder"], "open").exists():
            time.sleep(0.01)
        yield Step(output=index, state=index + 1)
