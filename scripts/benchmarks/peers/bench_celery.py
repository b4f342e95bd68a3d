"""Celery: Redis as broker and result backend, JSON, a high prefetch as its guide advises for short tasks."""

from __future__ import annotations

import os
from typing import Any

import celery
import kit

URL = os.environ["BENCH_URL"]


def make() -> Any:
    """An application with its task."""
    made = celery.Celery("bench", broker=URL, backend=URL, set_as_current=False)
    made.conf.update(
        task_default_queue=kit.QUEUE,
        worker_prefetch_multiplier=64,
        broker_connection_retry_on_startup=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        result_expires=3600,
    )

    @made.task(name="bench.noop")
    def noop(payload: dict[str, Any]) -> Any:
        return payload["n"]

    return made


app = make()


class Celery(kit.Producer):
    def open(self, url: str) -> None:
        # Another application each time: what the last one has declared is cleared away.
        self.app = make()
        self.noop = self.app.tasks["bench.noop"]

    def submit(self, payload: dict[str, Any]) -> Any:
        return self.noop.delay(payload)

    def result(self, handle: Any) -> Any:
        return handle.get(timeout=kit.WAIT)


if __name__ == "__main__":
    kit.serve(Celery())
