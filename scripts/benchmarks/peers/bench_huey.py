"""huey: four threads, and results whose reader is woken (``notify_result``)."""

from __future__ import annotations

import os
from typing import Any

import kit
from huey import RedisHuey

huey = RedisHuey("bench", url=os.environ["BENCH_URL"], notify_result=True)


@huey.task()
def noop(payload: dict[str, Any]) -> Any:
    return payload["n"]


class Huey(kit.Producer):
    def submit(self, payload: dict[str, Any]) -> Any:
        return noop(payload)

    def result(self, handle: Any) -> Any:
        return handle.get(blocking=True, timeout=int(kit.WAIT))


if __name__ == "__main__":
    # By the name under which the consumer imports it: huey calls a task by its module.
    import bench_huey

    kit.serve(bench_huey.Huey())
