"""docket: its worker with one task at a time and redelivery after a second, the least that is sane."""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import timedelta
from typing import Any

import kit
import notes
from docket import Docket, Worker


async def walk(payload: dict[str, Any]) -> Any:
    # A step is a short blocking piece of work, as a forward pass is.
    for _ in notes.steps(payload):
        await asyncio.sleep(0)
    return payload["steps"]


class Bench(kit.Producer):
    async def open(self, url: str) -> None:
        self.docket = Docket(name=kit.QUEUE, url=url, heartbeat_interval=timedelta(seconds=0.25))
        await self.docket.__aenter__()
        self.docket.register(walk)

    async def walk(self, payload: dict[str, Any]) -> Any:
        return await self.docket.add(walk, key=payload["name"])(payload)

    async def result(self, handle: Any) -> Any:
        return await handle.get_result(timeout=timedelta(seconds=kit.WAIT))


async def work(url: str) -> None:
    """A worker; its command takes whole seconds only."""
    async with Docket(name=kit.QUEUE, url=url, heartbeat_interval=timedelta(seconds=0.25)) as docket:
        docket.register(walk)
        quick = timedelta(seconds=0.1)
        async with Worker(
            docket,
            concurrency=1,
            redelivery_timeout=timedelta(seconds=1),
            minimum_check_interval=quick,
            scheduling_resolution=quick,
        ) as worker:
            await worker.run_forever()


if __name__ == "__main__":
    if sys.argv[1] == "work":
        asyncio.run(work(os.environ["BENCH_URL"]))
    else:
        kit.serve(Bench())
