"""RQ: ``Queue.enqueue``, ``enqueue_many``, and the result by ``latest_result(timeout)``, which blocks in Redis."""

from __future__ import annotations

from typing import Any

import kit
import notes
from redis import Redis
from rq import Queue, Retry


def noop(payload: dict[str, Any]) -> Any:
    return payload["n"]


def walk(payload: dict[str, Any]) -> Any:
    return len([*notes.steps(payload)])


class Rq(kit.Producer):
    bulk = True

    def open(self, url: str) -> None:
        self.queue = Queue(kit.QUEUE, connection=Redis.from_url(url))

    def submit(self, payload: dict[str, Any]) -> Any:
        return self.queue.enqueue("bench_rq.noop", payload)

    def submit_many(self, payloads: list[dict[str, Any]]) -> Any:
        return self.queue.enqueue_many([Queue.prepare_data("bench_rq.noop", (payload,)) for payload in payloads])

    def walk(self, payload: dict[str, Any]) -> Any:
        # SimpleWorker's record of an execution lives for the job's timeout and a minute: a walk takes three seconds.
        return self.queue.enqueue("bench_rq.walk", payload, retry=Retry(max=10), job_timeout=10)

    def result(self, handle: Any) -> Any:
        result = handle.latest_result(timeout=int(kit.WAIT))
        return result.return_value if result else None


if __name__ == "__main__":
    kit.serve(Rq())
