"""Tasks that leave a line in a file for every step, so that a test sees which were done twice."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from perdure.workers import Request, Step, task


@task
def walk(request: Request) -> Generator[Step, None, Any]:
    """Count to ``n``, ``sleep`` seconds each; every step is written down before it is put out."""
    trace = os.open(
        Path(request.payload["folder"], f"{request.id}.steps"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600
    )
    try:
        for index in range(request.state or 0, request.payload["n"]):
            time.sleep(request.payload["sleep"])
            os.write(trace, f"{index}\n".encode())
            yield Step(output=index, state=index + 1)
    finally:
        os.close(trace)
    return {"walked": request.payload["n"]}


@task(slots=8)
def flaky(request: Request) -> Generator[Step, None, Any]:
    """Fails in every attempt but the last that its payload allows."""
    yield Step(output=request.attempt)
    if request.attempt <= request.payload["failures"]:
        raise ArithmeticError("not yet")


@task
def stumble(request: Request) -> Generator[Step, None, Any]:
    """Counts to ``n``; fails at ``at`` until somebody has mended the world. Its result says where it began."""
    began = request.state or 0
    for index in range(began, request.payload["n"]):
        if index == request.payload["at"] and not Path(request.payload["folder"], "mended").exists():
            raise ArithmeticError("not mended yet")
        yield Step(output=index, state=index + 1)
    return {"began": began}
