"""Tasks whose names and errors the page shows. Nothing here knows the tests."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from perdure.workers import Request, Step, task


@task(slots=4)
def transcribe(request: Request) -> Generator[Step, None, Any]:
    """One segment after the other, ``sleep`` seconds each."""
    for index in range(request.state or 0, request.payload["segments"]):
        time.sleep(request.payload.get("sleep", 0.05))
        yield Step(output={"segment": index}, state=index + 1)
    return {"segments": request.payload["segments"]}


@task
def extract(request: Request) -> Generator[Step, None, Any]:
    """Fails for the reason that the payload gives."""
    yield Step(output="page 1", durable=True)
    raise ValueError(request.payload["reason"])


@task
def embed(request: Request) -> Generator[Step, None, Any]:
    """Fails as an arithmetic error does."""
    yield Step(output=1 / request.payload["norm"])
