"""Async generator tasks: all of a worker's run on one event loop, side by side.

Each request is one asyncio task for its whole execution, so that its context variables, timeouts and cancel
scopes reach from one step to the next.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, cast

from .base import Request, Step, Task
from .forks import foreign, in_child
from .generators import no_step
from .members import Member, Members, log

Running = AsyncGenerator[Step, None]


class AsyncBatch(Members):
    """Runs each async generator of a task on the event loop of one thread.

    A request that is dropped is canceled where it awaits, and closed. Code that blocks the loop holds all of them
    up: that is the task's to avoid, as in any program on asyncio.
    """

    def __init__(self, task: Task, news: Callable[[], None] = lambda: None) -> None:
        super().__init__(task, news)
        in_child(self._forked)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: float | None = None
        """Since when the event loop has been asked whether it runs (monotonic seconds)."""

    def stuck(self, step_timeout: float) -> str:
        loop = self._loop
        why = super().stuck(step_timeout)
        if why or loop is None or not self._late(step_timeout):
            return why
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            loop.call_soon_threadsafe(self._answer)
        elif now - self._asked > step_timeout:
            return f"its event loop has been blocked for {now - self._asked:.1f} s"
        return ""

    def _forked(self) -> None:
        # A child that awaits would run its parent's other requests as well, with their sockets.
        if self._loop is not None:
            self._loop.stop()

    def _answer(self) -> None:
        self._asked = None

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    def _start(self, member: Member) -> None:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.new_event_loop()
            name = f"{getattr(self.task, '__name__', 'task')}-loop"
            threading.Thread(target=self._run, args=(loop,), name=name, daemon=True).start()
        orders: asyncio.Queue[None] = asyncio.Queue()
        member.go = partial(loop.call_soon_threadsafe, orders.put_nowait, None)
        tasks: list[asyncio.Task[None]] = []
        member.stop = partial(loop.call_soon_threadsafe, _cancel, tasks)
        loop.call_soon_threadsafe(self._spawn, member, orders, tasks, context=member.context)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        while self._loop is loop:
            try:
                with foreign:
                    loop.run_forever()
            except BaseException:
                # asyncio lets KeyboardInterrupt and SystemExit of any task through: one that a request has started.
                log.exception("%r raised in a task of its own; its event loop goes on", self.task)
        loop.close()

    def _spawn(self, member: Member, orders: asyncio.Queue[None], tasks: list[asyncio.Task[None]]) -> None:
        if self._began(member):
            tasks.append(asyncio.get_running_loop().create_task(self._drive(member, orders)))

    async def _drive(self, member: Member, orders: asyncio.Queue[None]) -> None:
        generator: Running | None = None
        try:
            while True:
                await orders.get()
                if generator is None:
                    try:
                        generator = _generator(self.task, member.request)
                    except BaseException as error:
                        self._came(member, Step(error=error))
                        return
                if not self._came(member, await _advance(generator)):
                    return
        except asyncio.CancelledError:
            pass  # dropped while it waited for its next step
        finally:
            if generator is not None:
                await _close(generator, member.request.id)
            self._left(member)


def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


async def _advance(generator: Running) -> Step:
    """The next step of a generator; its end and what it raises are steps too."""
    try:
        with foreign:
            step: Any = await anext(generator)
    except StopAsyncIteration:
        return Step(result=None)
    except BaseException as error:  # nobody else would hear of a KeyboardInterrupt or CancelledError
        return Step(error=error)
    if isinstance(step, Step) and not step.ends:
        return step
    try:
        with foreign:
            await generator.aclose()
    except BaseException as error:
        return Step(error=error)
    return step if isinstance(step, Step) else Step(error=no_step(step))


async def _close(generator: Running, identifier: str) -> None:
    try:
        with foreign:
            await generator.aclose()
    except BaseException:
        log.exception("the generator of %s raised while it was closed", identifier)


def _generator(task: Task, request: Request) -> Running:
    with foreign:
        generator: object = task(request)
    if not inspect.isasyncgen(generator):
        raise TypeError(f"{task!r} returned a {type(generator).__name__}, not an async generator")
    return cast("Running", generator)
