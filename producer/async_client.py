"""The client and the handle for event loops: same methods, same answers, to be awaited."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterable
from contextlib import closing
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import redis

from ..protocol.errors import PerdureError
from ..protocol.keys import check_id
from ..protocol.records import Checkpoint, Details, Event, RequestRecord
from ..protocol.settings import Settings
from .admission import Submission, advance
from .arguments import DEFAULT, Default, waited, whole
from .async_session import AsyncSession
from .client import Client
from .handle import Reference
from .options import Submit, SubmitMany, taking
from .reading import questions
from .reading.loop_watch import LoopWatch
from .reading.outputs import OutputReader
from .reading.questions import Limit
from .reading.steps import Call, Fetch, Give, Hear, Join, Question, Read, Sleep, Step
from .reading.timeline import attempts_of
from .session import PATIENCE

P = ParamSpec("P")
Answer = TypeVar("Answer")


class AsyncHandle(Reference[AsyncSession]):
    """One request: ``id``, and questions about it. ``await handle`` is ``await handle.result()``.

    What :class:`Handle` says holds here. A task that waits may be canceled at any time: the request goes on, and
    nothing is left behind.
    """

    __slots__ = ()

    _kind = "async"

    # --- questions -------------------------------------------------------------------------------

    async def record(self) -> RequestRecord:
        """Everything but payload, outputs and result, as it stands now."""
        return await self._ask(questions.fetched(self.id))

    async def status(self) -> str:
        """RQ's word: queued, scheduled, started, finished, failed, canceled or stopped."""
        return str((await self.record()).status)

    async def done(self) -> bool:
        """True once it has ended, in whatever way."""
        return (await self.record()).ended

    async def attempts(self) -> int:
        """How many attempts were begun."""
        return attempts_of(await self.record())

    async def degraded(self) -> bool:
        """True if it runs, or ran, with the overrides that were given as ``degraded``."""
        return (await self.record()).degraded

    async def history(self) -> list[Event]:
        """What happened to it, oldest first."""
        return await self._ask(questions.history(self.id))

    async def details(self) -> Details:
        """What it was given at its submit (deadline, meta, …), and what it waits for."""
        return await self._ask(questions.details(self.id))

    async def checkpoint(self) -> Checkpoint | None:
        """Where another worker would go on from now; ``None`` if there is nothing to go on from."""
        return await self._ask(questions.checkpoint(self.id))

    async def traceback(self) -> str:
        """The traceback, or the stacks, with which it last failed; empty if there is none."""
        return await self._ask(questions.traceback(self.id))

    async def offset(self) -> int:
        """How many outputs are stored."""
        return await self._ask(questions.offset(self.id))

    async def outputs(self) -> list[Any]:
        """All outputs so far; does not wait."""
        return await self._ask(questions.outputs(self.id))

    # --- waiting ---------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    async def result(self, timeout: float | Default | None = DEFAULT) -> Any:
        """Wait for the end and return the result; raises as :meth:`Handle.result` does."""
        return await self._ask(questions.result(self.id, self._limit(timeout), self._session.patience))

    async def exception(self, timeout: float | Default | None = DEFAULT) -> PerdureError | None:
        """Wait for the end and return what :meth:`result` would raise; ``None`` if it has finished."""
        return await self._ask(questions.exception(self.id, self._limit(timeout)))

    async def wait(self, timeout: float | Default | None = DEFAULT) -> bool:
        """Wait for the end, whatever it is; False if it has not come within ``timeout`` (as in :meth:`result`)."""
        try:
            await self._ask(questions.ended(self.id, self._limit(timeout)))
        except TimeoutError:
            return False
        return True

    def stream(
        self, start: int = 0, *, restarts: bool = False, timeout: float | Default | None = DEFAULT
    ) -> AsyncGenerator[Any]:
        """``async for`` each output once and in order, until the request ends; see :meth:`Handle.stream`.

        Leave it early inside ``contextlib.aclosing`` if it must be cleaned up at once.
        """
        reader = OutputReader(self.id, start=whole(start, "start", 0), restarts=restarts)
        return self._give(questions.stream(reader, self.id, self._limit(timeout), self._session.patience))

    async def cancel(self, reason: str = "") -> bool:
        """Cancel the request (not the waiting for it); see :meth:`Handle.cancel`."""
        return await self._ask(questions.cancel(self.id, reason))

    # --- within ----------------------------------------------------------------------------------

    def _limit(self, timeout: float | Default | None) -> Limit:
        return Limit.of_call(timeout, self._session.settings)

    async def _ask(self, question: Question[Answer]) -> Answer:
        with closing(question):
            answer = None
            while True:
                try:
                    step = question.send(answer)
                except StopIteration as end:
                    final: Answer = end.value
                    return final
                answer = await self._do(step)

    async def _give(self, question: Question[None]) -> AsyncGenerator[Any]:
        with closing(question):
            answer = None
            while True:
                try:
                    step = question.send(answer)
                except StopIteration:
                    return
                if isinstance(step, Give):
                    answer = None
                    for output in step.outputs:
                        yield output
                else:
                    answer = await self._do(step)

    async def _do(self, step: Step) -> Any:
        match step:
            case Sleep(watch, silence, most, place, deadline):
                assert isinstance(watch, LoopWatch)
                return await watch.hint(silence, most, place, deadline)
            case Read(id, place, deadline, check):
                return await self._session.page(id, place, deadline, check=check)
            case Fetch(id, deadline, _):
                return await self._session.fetch(id, deadline)
            case Call(operation, deadline):
                return await self._session.call(operation, deadline=deadline)
            case Hear(id):
                return self._session.hear(id)
            case Join(id, channel, outputs):
                return self._session.watch(id, channel, outputs=outputs)
        raise TypeError(f"no step: {step!r}")


AsyncHandles = list[AsyncHandle]


class FoundHandle(AsyncHandle):
    """What :meth:`AsyncClient.get` gives. ``await`` turns it into a handle as ``await client.submit(…)`` gives.

    So ``handle = await client.get(id)`` and ``await client.get(id).result()`` both do what they say.
    """

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, AsyncHandle]:
        return self._plain().__await__()

    async def _plain(self) -> AsyncHandle:
        return AsyncHandle(self.id, self._session_or_none)

    def __reduce__(self) -> tuple[Any, ...]:
        return AsyncHandle, (self.id, None)


def _awaited(
    method: Callable[Concatenate[Client, P], Answer],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, Answer]]:
    """A method of the client that runs in a thread: whatever it takes and checks is the same here."""

    @wraps(method)
    async def call(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        return await self._session.run(partial(method, self._client, *args, **kwargs))

    return call


class AsyncClient:
    """A producer's connection to the pool, for one event loop. One is enough for any number of tasks.

    ::

        async with AsyncClient() as client:
            handle = await client.submit("app.tasks.count", {"n": 3}, queue="gpu")
            async for output in handle.stream():
                ...
            await handle

    Arguments, and what its methods take, return and raise, are those of :class:`Client`. It belongs to the loop
    that uses it first. A task that is canceled in :meth:`submit` cannot know whether the request was stored.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        connection: redis.Redis | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._client = Client(url, settings=settings, connection=connection, patience=patience)
        self._session = AsyncSession(self._client._session)

    @classmethod
    def from_url(cls, url: str, *, settings: Settings | None = None, patience: float = PATIENCE) -> Self:
        """A client for ``redis://``, ``rediss://`` or ``unix://``."""
        return cls(url, settings=settings, patience=patience)

    @property
    def settings(self) -> Settings:
        """The settings that this client works with."""
        return self._session.settings

    @taking(Submit)
    async def submit(self, asked: Submit) -> AsyncHandle:
        """As :meth:`Client.submit`, to be awaited."""
        return await self.get((await self._through(self._client._submission(asked))).id)

    @taking(SubmitMany)
    async def submit_many(self, asked: SubmitMany) -> AsyncHandles:
        """As :meth:`Client.submit_many`, to be awaited."""
        handles = await self._through(self._client._submissions(asked))
        return [await self.get(handle.id) for handle in handles]

    list = _awaited(Client.list)
    """As :meth:`Client.list`, to be awaited."""
    mode = _awaited(Client.mode)
    """As :meth:`Client.mode`, to be awaited."""
    ping = _awaited(Client.ping)
    """As :meth:`Client.ping`, to be awaited."""

    def get(self, id: str) -> FoundHandle:
        """The handle of a request, whoever submitted it; ``await`` it, as what :meth:`submit` gives, or use it at once.

        Asks nobody: an unknown id shows when it is used.
        """
        return FoundHandle(check_id(id), self._session)

    async def _through(self, submission: Submission[Answer]) -> Answer:
        """Drive a submit: its steps block in a thread, its pauses keep none."""
        while True:
            pause, answer = await self._session.run(partial(advance, submission))
            if pause is None:
                return answer  # type: ignore[return-value]
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """End the listener, threads and connections. What waits raises. Harmless when repeated."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def as_completed_async(
    handles: Iterable[AsyncHandle], timeout: float | None = None
) -> AsyncIterator[AsyncHandle]:
    """``async for`` handles in the order in which their requests end, in whatever way; see :func:`as_completed`."""
    limit = math.inf if timeout is None else waited(timeout, "timeout")
    ended: asyncio.Queue[asyncio.Task[bool]] = asyncio.Queue()
    tasks: dict[asyncio.Task[bool], AsyncHandle] = {}
    late = 0
    try:
        for handle in dict.fromkeys(handles):
            task = asyncio.create_task(handle.wait(limit))
            tasks[task] = handle
            task.add_done_callback(ended.put_nowait)
        number = len(tasks)
        while tasks:
            task = await ended.get()
            handle = tasks.pop(task)
            if task.result():
                yield handle
            else:
                late += 1
        if late:
            by = "by their deadlines" if limit == math.inf else f"within {limit:g} s"
            raise TimeoutError(f"{late} of {number} requests have not ended {by}; they go on")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
