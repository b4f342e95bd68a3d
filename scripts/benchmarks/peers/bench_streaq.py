"""streaQ: 64 tasks at once, ``enqueue_many``, results by its channel."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import kit
from streaq import Worker

worker = Worker(redis_url=os.environ["BENCH_URL"], queue_name=kit.QUEUE, concurrency=64)


@worker.task()
async def noop(payload: dict[str, Any]) -> Any:
    return payload["n"]


class Streaq(kit.Producer):
    bulk = True
    entered = False

    async def open(self, url: str) -> None:
        if not self.entered:
            await worker.__aenter__()
            self.entered = True

    async def submit(self, payload: dict[str, Any]) -> Any:
        return await noop.enqueue(payload)

    async def submit_many(self, payloads: list[dict[str, Any]]) -> Any:
        tasks = [noop.enqueue(payload) for payload in payloads]
        await worker.enqueue_many(tasks)
        return tasks

    async def result(self, handle: Any) -> Any:
        return (await handle.result(timeout=int(kit.WAIT))).result

    async def results(self, handles: list[Any]) -> Any:
        # One by one each takes a tenth of a second, which its subscription waits for.
        found: list[Any] = []
        for first in range(0, len(handles), 20):
            found += await asyncio.gather(*(self.result(handle) for handle in handles[first : first + 20]))
        return found


if __name__ == "__main__":
    kit.serve(Streaq())
