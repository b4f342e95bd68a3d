"""Tasks that print."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator

from perdure.workers import Request, Step, task


@task
def loud(request: Request) -> Generator[Step, None, None]:
    print("printed by a task")
    sys.stderr.write("x" * 200_000 + "\n")
    sys.stdout.write("no end of line")
    sys.stdout.flush()
    sys.stdout.write("\n")
    yield Step()
    raise ValueError("of the task's own")


@task
def slowly(request: Request) -> Generator[Step, None, None]:
    for index in range(request.state or 0, request.payload["n"]):
        time.sleep(0.01)
        print("step", index, flush=True)
        yield Step(output=index, state=index + 1)
