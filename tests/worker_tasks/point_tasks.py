"""Tasks for the tests that kill a process between two effects."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from perdure.workers import Request, Step, task


@task
def steps(request: Request) -> Generator[Step, None, Any]:
    """Count to 6. The payload says which run fails, how large a state is, and which file ends a long step."""
    payload = request.payload
    begin = request.state[0] if request.state else 0
    for index in range(begin, 6):
        if index == 3 and payload.get("until") and not Path(payload["until"]).exists():
            Path(payload["reached"]).touch()
            while not Path(payload["until"]).exists():
                time.sleep(0.01)
        if index == 3 and request.attempt <= payload.get("fails", 0):
            raise RuntimeError("as the payload wants")
        time.sleep(0.03)
        yield Step(output=index, state=[index + 1, b"x" * payload.get("bytes", 0)])
    return {"counted": 6}
