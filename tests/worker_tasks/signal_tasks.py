"""Tasks that change what their process does with signals."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Generator
from typing import Any

from perdure.workers import Request, Step, task


@task
def event_loop(request: Request) -> Generator[Step, None, str]:
    """An event loop with handlers of its own, which takes them away again."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: None)
        await asyncio.sleep(0)
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    yield Step(output=0)
    asyncio.run(run())
    return "done"


@task
def changes(request: Request) -> Generator[Step, None, Any]:
    """Takes SIGTERM for itself in each step, and counts for long."""
    for index in range(len(request.outputs), 100_000):
        if request.payload["how"] == "wakeup":
            signal.set_wakeup_fd(-1)
        else:
            signal.signal(
                signal.SIGTERM, {"ignored": signal.SIG_IGN, "default": signal.SIG_DFL}[request.payload["how"]]
            )
        time.sleep(0.1)
        yield Step(output=index)
