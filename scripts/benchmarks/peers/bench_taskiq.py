"""taskiq with taskiq-redis: its stream broker, which acknowledges, and results asked for every millisecond."""

from __future__ import annotations

import os
from typing import Any

import kit
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

URL = os.environ["BENCH_URL"]


def make() -> Any:
    backend: Any = RedisAsyncResultBackend(redis_url=URL, result_ex_time=3600)
    return RedisStreamBroker(url=URL, queue_name=kit.QUEUE).with_result_backend(backend)


broker = make()


@broker.task(task_name="bench.noop")
async def noop(payload: dict[str, Any]) -> Any:
    return payload["n"]


class Taskiq(kit.Producer):
    async def open(self, url: str) -> None:
        await broker.startup()  # makes the consumer group again

    async def submit(self, payload: dict[str, Any]) -> Any:
        return await noop.kiq(payload)

    async def result(self, handle: Any) -> Any:
        return (await handle.wait_result(check_interval=0.001, timeout=kit.WAIT)).return_value


if __name__ == "__main__":
    kit.serve(Taskiq())
