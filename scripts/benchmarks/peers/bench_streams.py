"""Streams: a task that puts out what time it is, a client that reads many, and a writer that plays their workers.

``read`` is the client that is measured; ``write`` stores as a worker would, but without the scripts, so that the rest
of the machine is enough for it. ``bare`` and ``bare-write`` are Redis' own streams: what one would use without us.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import kit
import redis
import redis.asyncio

from perdure.producer import AsyncClient, AsyncHandle
from perdure.protocol.codec import pack_entry
from perdure.protocol.keys import key
from perdure.workers import BatchTask, Request, Step

TASK = "bench_streams.Clock"


class Clock(BatchTask):
    """Each step takes ``pause`` seconds, and puts out the time at its end for each request, ``steps`` times."""

    slots = 64

    def __init__(self) -> None:
        self.running: dict[str, tuple[dict[str, Any], int]] = {}

    def admit(self, request: Request) -> None:
        self.running[request.id] = (request.payload, len(request.outputs))

    def step(self) -> Iterable[Step]:
        time.sleep(max(payload["pause"] for payload, _ in self.running.values()))
        now, steps = time.monotonic(), []
        for name, (payload, number) in list(self.running.items()):
            self.running[name] = payload, number + 1
            if number + 1 < payload["steps"]:
                steps.append(Step(request_id=name, output=[number, now]))
            else:
                del self.running[name]
                steps.append(Step(request_id=name, output=[number, now], result=None))
        return steps

    def drop(self, request_id: str) -> None:
        self.running.pop(request_id, None)


class Reader:
    """What one process reads; ``lags`` are seconds from the output to the caller."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self.firsts: list[float] = []
        self.counts: list[int] = []
        self.wrong = 0
        self.tasks: list[asyncio.Task[None]] = []

    def follow(self, streams: list[Any]) -> None:
        self.lags, self.firsts, self.counts, self.wrong = [], [], [0] * len(streams), 0
        self.used, self.began = time.process_time(), time.monotonic()
        self.tasks = [asyncio.create_task(self._follow(place, stream)) for place, stream in enumerate(streams)]

    async def _follow(self, place: int, stream: Any) -> None:
        async for number, at in stream:
            lag = time.monotonic() - at
            self.wrong += number != self.counts[place]
            self.counts[place] += 1
            (self.lags if number else self.firsts).append(lag)

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = await getattr(self, "on_" + command.pop("do"))(**command)
        return found

    async def on_ended(self, steps: int) -> dict[str, Any]:
        """Wait for all; what was missing or out of order counts as wrong."""
        await asyncio.gather(*self.tasks)
        wrong = self.wrong + sum(abs(count - steps) for count in self.counts)
        return {
            "lags": self.lags, "firsts": self.firsts, "wrong": wrong, "cpu": time.process_time() - self.used,
            "seconds": time.monotonic() - self.began,
        }  # fmt: skip


class PerdureReader(Reader):
    """By ``AsyncClient``, as users write it."""

    async def on_open(self, url: str, cpu: int | None) -> dict[str, Any]:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        self.client = AsyncClient(url)
        self.look = redis.Redis.from_url(url)
        self.handles: list[AsyncHandle] = []
        return {}

    async def on_submit(self, number: int, payload: dict[str, Any]) -> dict[str, Any]:
        self.handles = await self.client.submit_many([(TASK, payload)] * number, queue=kit.QUEUE)
        self.follow([handle.stream(timeout=120) for handle in self.handles])
        return {"ids": [handle.id for handle in self.handles]}

    async def on_subscribed(self, seconds: float) -> dict[str, Any]:
        """Wait until each of them is listened to; then, how much of a core so many seconds of silence take."""
        names = [key("replies", f"{handle.id}:outputs") for handle in self.handles]
        while not all(number for _, number in self.look.pubsub_numsub(*names)):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(0.2)
        # Each looks once more when it is subscribed. Then there is silence.
        while await self._share(1.0) > 0.2:
            pass
        share = await self._share(seconds)
        self.used, self.began = time.process_time(), time.monotonic()
        return {"share": share}

    async def _share(self, seconds: float) -> float:
        used = time.process_time()
        await asyncio.sleep(seconds)
        return (time.process_time() - used) / seconds


class BareReader(Reader):
    """By ``XREAD``, a connection for each stream."""

    async def on_open(self, url: str, cpu: int | None) -> dict[str, Any]:
        self.redis = redis.asyncio.Redis.from_url(url)
        return {}

    async def on_submit(self, number: int, payload: dict[str, Any]) -> dict[str, Any]:
        names = [f"bare:{place}" for place in range(number)]
        self.follow([self._stream(name, payload["steps"]) for name in names])
        return {"ids": names}

    async def _stream(self, name: str, steps: int) -> Any:
        last, got = b"0", 0
        while got < steps:
            found: Any = await self.redis.xread({name: last}, block=60_000)
            entries = found[name.encode()][0] if isinstance(found, dict) else found[0][1]
            for at, fields in entries:
                last, got = at, got + 1
                yield int(fields[b"n"]), float(fields[b"t"])


class Writer:
    """Plays workers: ``rate`` outputs a second for each of these requests, in calls of 64, for some seconds."""

    def __init__(self, url: str, *, bare: bool) -> None:
        self.redis, self.bare = redis.Redis.from_url(url), bare

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        command.pop("do")
        return await asyncio.to_thread(self.write, **command)

    def write(self, ids: list[str], rate: float, steps: int, together: bool) -> dict[str, Any]:
        """``together``: all in one moment, as the step of a batch; else evenly over the time."""
        raw: Any = None if self.bare else self.redis.hget(key("job", ids[0]), "client")
        client = raw.decode() if raw else ""
        began, late = time.monotonic(), 0.0
        parts = [ids[first : first + 64] for first in range(0, len(ids), 64)]
        for number in range(steps):
            for place, part in enumerate(parts):
                due = began + (number + (1 if together else place / len(parts))) / rate
                time.sleep(max(0.0, due - time.monotonic()))
                late = max(late, time.monotonic() - due)
                self.store(part, number)
        if not self.bare:
            with self.redis.pipeline(transaction=False) as pipe:
                for name in ids:
                    pipe.hset(key("job", name), "status", "finished")
                    pipe.publish(key("replies", client), f"{name} end")
                pipe.execute()
        return {"late": late, "seconds": time.monotonic() - began}

    def store(self, names: list[str], number: int) -> None:
        now = time.monotonic()
        with self.redis.pipeline(transaction=False) as pipe:
            for name in names:
                if self.bare:
                    pipe.xadd(name, {"n": number, "t": now})
                else:
                    pipe.rpush(key("output", name), pack_entry(0, number, [[number, now]]))
                    pipe.publish(key("replies", f"{name}:outputs"), f"{name} {number + 1}")
            pipe.execute()


if __name__ == "__main__":
    match sys.argv[1]:
        case "read":
            kit.serve_agent(PerdureReader())
        case "bare":
            kit.serve_agent(BareReader())
        case kind:
            kit.serve_agent(Writer(os.environ["BENCH_URL"], bare=kind == "bare-write"))
