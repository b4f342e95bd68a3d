"""Tasks of a supervised pool: what they do to their workers is the test's choice."""

import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from perdure.workers import BatchTask, Request, Step, task


@task
def leave(request: Request) -> Generator[Step, None, Any]:
    """End the process with the ``status`` of the payload, or by its ``signal``, in the first step."""
    if request.payload.get("signal"):
        os.kill(os.getpid(), request.payload["signal"])
        signal.pause()
    if "status" in request.payload:
        os._exit(request.payload["status"])
    yield Step()


class Slow(BatchTask):
    """Loads until somebody opens the gate that ``POOL_GATE`` names."""

    slots = 1

    def load(self) -> None:
        Path(os.environ["POOL_GATE"] + f".{os.getpid()}").touch()
        while not Path(os.environ["POOL_GATE"]).exists():
            time.sleep(0.02)

    def fingerprint(self) -> str:
        return "slow"

    def admit(self, request: Request) -> None:
        raise NotImplementedError

    def step(self) -> list[Step]:
        return []

    def drop(self, request_id: str) -> None:
        pass
