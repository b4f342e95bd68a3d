"""RQ: ``Queue.enqueue``, ``enqueue_many``, and the result by ``latest_result(timeout)``, which blocks in Redis."""

from __future__ import annotations

from typing import Any

import kit
from redis import Redis
from rq import Queue


def noop(payload: dict[str, Any]) -> Any:
    return payload["n"]


class Rq(kit.Producer):
    bulk = True

    def open(self, url: str) -> None:
        self.queue = Queue(kit.QUEUE, connection=Redis.from_url(url))

    def submit(self, payload: dict[str, Any]) -> Any:
        return self.queue.enqueue("bench_rq.noop", payload)

    def submit_many(self, payloads: list[dict[str, Any]]) -> Any:
        return self.queue.enqueue_many([Queue.prepare_data("bench_rq.noop", (payload,)) for payload in payloads])

    def result(self, handle: Any) -> Any:
        result = handle.latest_result(timeout=int(kit.WAIT))
        return result.return_value if result else None


if __name__ == "__main__":
    kit.serve(Rq())
