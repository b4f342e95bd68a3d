"""dramatiq: Redis broker with the results middleware, eight threads; ``get_result(block=True)`` waits in Redis."""

from __future__ import annotations

import os
from typing import Any

import dramatiq
import kit
import notes
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

URL = os.environ["BENCH_URL"]
# As fast as it can be made to notice a dead worker: a heartbeat of a second, and a look with every command.
FAST: dict[str, Any] = {"heartbeat_timeout": 1000, "maintenance_chance": 1_000_000}
broker = RedisBroker(url=URL, **(FAST if os.environ.get("BENCH_FAST") else {}))
backend = RedisBackend(url=URL)
broker.add_middleware(Results(backend=backend))
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=kit.QUEUE, store_results=True)
def noop(payload: dict[str, Any]) -> Any:
    return payload["n"]


@dramatiq.actor(queue_name=kit.QUEUE, store_results=True)
def walk(payload: dict[str, Any]) -> Any:
    return len([*notes.steps(payload)])


class Dramatiq(kit.Producer):
    def submit(self, payload: dict[str, Any]) -> Any:
        return noop.send(payload)

    def walk(self, payload: dict[str, Any]) -> Any:
        return walk.send(payload)

    def result(self, handle: Any) -> Any:
        return handle.get_result(backend=backend, block=True, timeout=int(kit.WAIT * 1000))


if __name__ == "__main__":
    kit.serve(Dramatiq())
