"""SAQ with hiredis: 64 jobs at once; ``job.refresh(until_complete=…)`` listens for the end."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import kit
from saq import Queue

PATIENCE = 0.5  # seconds: it listens only after it has looked, and an end between the two is not heard of

queue = Queue.from_url(os.environ["BENCH_URL"], name=kit.QUEUE)


async def noop(context: Any, *, payload: dict[str, Any]) -> Any:
    return payload["n"]


settings = {"queue": queue, "functions": [("bench_saq.noop", noop)], "concurrency": 64}


def _value(job: Any) -> Any:
    return job.result if job.result is not None else f"{job.status}: {job.error}"


class Saq(kit.Producer):
    async def open(self, url: str) -> None:
        await queue.connect()

    async def submit(self, payload: dict[str, Any]) -> Any:
        return await queue.enqueue("bench_saq.noop", payload=payload)

    async def result(self, handle: Any) -> Any:
        until = time.monotonic() + kit.WAIT
        while not handle.completed:
            try:
                await handle.refresh(until_complete=PATIENCE)
            except TimeoutError:
                if time.monotonic() > until:
                    raise
        return _value(handle)

    async def results(self, handles: list[Any]) -> Any:
        # Most have ended: nothing is to be waited for.
        await asyncio.gather(*(handle.refresh() for handle in handles))
        return [_value(handle) if handle.completed else await self.result(handle) for handle in handles]


if __name__ == "__main__":
    kit.serve(Saq())
