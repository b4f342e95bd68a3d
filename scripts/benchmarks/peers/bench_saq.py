"""SAQ with hiredis: 64 jobs at once; ``job.refresh(until_complete=…)`` listens for the end."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import kit
from saq import Queue

queue = Queue.from_url(os.environ["BENCH_URL"], name=kit.QUEUE)


async def noop(context: Any, *, payload: dict[str, Any]) -> Any:
    return payload["n"]


settings = {"queue": queue, "functions": [("bench_saq.noop", noop)], "concurrency": 64}


class Saq(kit.Producer):
    async def open(self, url: str) -> None:
        await queue.connect()

    async def submit(self, payload: dict[str, Any]) -> Any:
        return await queue.enqueue("bench_saq.noop", payload=payload)

    async def result(self, handle: Any) -> Any:
        await handle.refresh(until_complete=kit.WAIT)
        return handle.result

    async def results(self, handles: list[Any]) -> Any:
        # They have ended: nothing is to be waited for.
        await asyncio.gather(*(handle.refresh() for handle in handles))
        return [handle.result for handle in handles]


if __name__ == "__main__":
    kit.serve(Saq())
