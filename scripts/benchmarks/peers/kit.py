"""The producer's side of a measurement: one command per line in (JSON), one answer per line out.

It measures here, in the process that submits, so that no pipe is part of a figure. The loops are the same for
all systems; what a system does for each of them stands in its own file. Only the standard library is used.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
from typing import Any

QUEUE = "bench"
SIZE = 200  # bytes of a payload as JSON
WAIT = 20.0  # seconds that a result may take


def payload_of(number: int) -> dict[str, Any]:
    """What the no-op request number so-and-so carries: 200 bytes as JSON."""
    payload = {"n": number, "text": ""}
    return {"n": number, "text": "." * max(0, SIZE - len(json.dumps(payload)))}


class Producer:
    """What a system does; methods may be coroutines. ``bulk`` says whether :meth:`submit_many` is there."""

    bulk = False

    def open(self, url: str) -> Any:
        """Connect."""

    def submit(self, payload: dict[str, Any]) -> Any:
        """Put one request in; returns what :meth:`result` takes."""
        raise NotImplementedError

    def submit_many(self, payloads: list[dict[str, Any]]) -> Any:
        """Put many in as the system's documentation does it; returns a list."""
        raise NotImplementedError

    def walk(self, payload: dict[str, Any]) -> Any:
        """Put one request in whose worker takes the steps of :func:`notes.steps`."""
        raise NotImplementedError

    def result(self, handle: Any) -> Any:
        """Wait for the result in the quickest way that is documented; it is the payload's ``n``."""
        raise NotImplementedError

    def results(self, handles: list[Any]) -> Any:
        """The results of many that have ended; ``None`` to have :meth:`result` asked for each."""
        return None


async def settled(value: Any) -> Any:
    """The value, awaited if it must be."""
    return await value if inspect.isawaitable(value) else value


class Agent:
    """Carries out the commands of one run."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self.handles: list[Any] = []

    async def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what the command says. A handler's name is ``on_`` and the command."""
        handler = getattr(self, "on_" + command.pop("do"))
        found: dict[str, Any] = await handler(**command)
        return found

    async def on_open(self, url: str) -> dict[str, Any]:
        await settled(self.producer.open(url))
        return {"bulk": self.producer.bulk}

    async def on_submit(self, number: int) -> dict[str, Any]:
        """So many, each after the last was accepted."""
        payloads = [payload_of(place) for place in range(number)]
        submit = self.producer.submit
        self.handles = []
        began = time.perf_counter()
        for payload in payloads:
            self.handles.append(await settled(submit(payload)))
        return {"seconds": time.perf_counter() - began}

    async def on_bulk(self, number: int) -> dict[str, Any]:
        payloads = [payload_of(place) for place in range(number)]
        began = time.perf_counter()
        self.handles = list(await settled(self.producer.submit_many(payloads)))
        return {"seconds": time.perf_counter() - began}

    async def on_check(self, number: int, every: int) -> dict[str, Any]:
        """Read the first results back, or one of so many, and compare each with what it must be."""
        handles = self.handles[:number:every]
        found = await settled(self.producer.results(handles))
        if found is None:
            found = [await self._result(handle) for handle in handles]
        wrong = [place for place, value in enumerate(found) if value != place * every]
        return {
            "checked": len(found),
            "wrong": len(wrong),
            "examples": [[place, repr(found[place])] for place in wrong[:3]],
        }

    async def _result(self, handle: Any) -> Any:
        try:
            return await asyncio.wait_for(settled(self.producer.result(handle)), WAIT)
        except Exception as error:
            return repr(error)

    async def on_latency(self, number: int, pause: float, seconds: float) -> dict[str, Any]:
        """Submit to result, each after the last one and a pause; at most so many seconds in all."""
        times = []
        submit, result = self.producer.submit, self.producer.result
        until = time.monotonic() + seconds
        for place in range(number):
            if pause:
                await asyncio.sleep(pause)
            payload = payload_of(place)
            began = time.perf_counter()
            value = await settled(result(await settled(submit(payload))))
            times.append((time.perf_counter() - began) * 1000)
            if value != place:
                raise RuntimeError(f"request {place} came back as {value!r}")
            if time.monotonic() > until:
                break
        return {"ms": times}

    async def on_walk(self, payloads: list[dict[str, Any]]) -> dict[str, Any]:
        """Put walks in."""
        self.handles = [await settled(self.producer.walk(payload)) for payload in payloads]
        return {}

    async def on_ended(self) -> dict[str, Any]:
        """Wait for the walks; a system without results has ``None``."""
        return {"results": [await self._result(handle) for handle in self.handles]}

    async def on_load(self, rate: float, seconds: float) -> dict[str, Any]:
        """Submit at a steady rate, a hundred times a second, and leave the results alone."""
        began = time.monotonic()
        done = 0
        while (now := time.monotonic() - began) < seconds:
            due = int(rate * now) - done
            if due > 0 and self.producer.bulk:
                await settled(self.producer.submit_many([payload_of(done + place) for place in range(due)]))
                done += due
            elif due > 0:
                for place in range(due):
                    await settled(self.producer.submit(payload_of(done + place)))
                done += due
            await asyncio.sleep(0.01)
        return {"submitted": done, "seconds": time.monotonic() - began}


def serve(producer: Producer) -> None:
    """Answer for a producer until the standard input ends: the harness' death is seen here."""
    serve_agent(Agent(producer))


def serve_agent(agent: Agent) -> None:
    """The same for an agent with commands of its own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    asyncio.run(_serve(agent, answers))


async def _serve(agent: Agent, answers: Any) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer = await agent.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
