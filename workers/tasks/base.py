"""Tasks: what users write.

A task is a generator function under :func:`task`, ``def`` or ``async def``, or a subclass of
:class:`BatchTask`. Either way it moves in *steps*. A step may carry an output (what a client streams) and a state (what
a later execution of the request starts from); both are durable within the checkpoint interval.

Nothing here knows Redis: a task can be run and tested without a server.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

from ...protocol.errors import InvalidRequest
from ...protocol.tasks import ClassTask, FunctionTask, path_of
from .unfit import Unfit

if TYPE_CHECKING:
    from .collectives import Collectives

__all__ = [
    "NOTHING",
    "BatchTask",
    "InvalidRequest",
    "Request",
    "Step",
    "Task",
    "Unfit",
    "task",
]


class _Nothing:
    """The absence of a value, where ``None`` is a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NOTHING"

    def __bool__(self) -> bool:
        return False


NOTHING: Final = _Nothing()

RAISED: Final = BaseException
"""What a task may raise: anything. ``sys.exit()``, a ``CancelledError`` or a panic of a native library in it ends its
request, not the worker and everybody else's requests. No signal of ours raises in the main thread.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a task sees of the request it runs.

    ``outputs`` and ``state`` are those of the last checkpoint: empty and ``None`` when the request
    starts from zero. ``attempt`` counts from 1 and grows only when an execution ended by the
    request's own failure; ``execution`` is new for every claim. Side effects should be keyed by
    ``id`` (once per request), ``attempt`` or ``execution``.
    """

    id: str
    payload: Any
    attempt: int = 1
    execution: str = ""
    outputs: list[Any] = field(default_factory=list)
    state: Any = None
    queue: str = ""
    submitted: float = 0.0
    """When it was submitted, in seconds since 1970, the same in each execution; 0 if nobody knows."""

    @property
    def resumed(self) -> bool:
        """True when an earlier execution left something to go on from."""
        return bool(self.outputs) or self.state is not None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one request.

    ``output`` is appended to what the client streams; ``state`` replaces the stored state; either
    may be left out. ``result`` ends the request with that value, and ``error`` with that failure (and
    leaves its batch-mates alone); a generator is closed then. With ``durable`` a generator goes on only
    once all that the request has put out is in Redis. In a :class:`BatchTask`, ``request_id`` says whose
    step it is.
    """

    output: Any = NOTHING
    state: Any = NOTHING
    request_id: str = ""
    result: Any = NOTHING
    error: BaseException | None = None
    durable: bool = False

    @property
    def ends(self) -> bool:
        """True when the request is over with this step."""
        return self.result is not NOTHING or self.error is not None


@dataclass(frozen=True, slots=True)
class Raised(Step):
    """What an engine raised while it computed for one request only.

    Unlike with an ``error`` that a task found in a request, nobody knows yet whether the request is to blame or the
    engine (:mod:`..engine.soundness`).
    """


class BatchTask(ClassTask):
    """Many requests in one forward pass, on one warm instance per worker process.

    The worker calls, always from one thread: :meth:`load` once; :meth:`admit` when a request joins;
    :meth:`step` as long as any request is admitted; :meth:`drop` when one leaves without having
    ended by a step of its own (canceled, lost to another worker, handed back in a drain). A request
    that ended by ``result`` or ``error`` has left: it is not dropped as well.

    An exception from :meth:`admit` fails that request. One from :meth:`step` with several admitted makes all of
    them suspects, since nobody can tell whose it was: they run on in halves, uncharged, until one raises alone. Better
    catch what one request can cause, and yield ``Step(request_id=…, error=…)`` for it. ``torch.OutOfMemoryError`` fails
    only a request that was alone. Others are dropped, go back to their checkpoints, and are admitted again, fewer at
    once. After ``torch.AcceleratorError`` (but out of memory) nothing here is called any more: the process leaves.
    :class:`Unfit`, from any method, says that the process is at fault and no request.
    """

    slots: int = 8
    """How many requests are admitted at once, at most."""
    step_timeout: float | None = None
    """Seconds that one step may take; ``None`` takes the worker's ``PERDURE_STEP_TIMEOUT``."""
    reproducible: bool = True
    """True when a restart from zero yields the same outputs again."""
    ranks: int = 1
    """How many processes run the task together, each a part of it. With more than one, all methods but :meth:`prepare`
    are called on every rank in the same order, and what rank 0 puts out is what counts."""
    group: Collectives | None = None
    """This process' place in the group; ``None`` with one rank."""

    def load(self) -> None:
        """Load weights and the like. Called once per process, before the first :meth:`admit`.

        In a group, the other ranks load at the same time, and cannot be reached yet.
        """

    def meet(self) -> None:
        """Begin anew with the other ranks, on all of them; only called in a group, which :attr:`group` now reaches.

        After :meth:`load`, and again whenever a rank was replaced. No request is admitted. Whatever decides
        about the next steps must be again as it was after the first time, or the ranks part ways.
        """

    def fingerprint(self) -> str:
        """What must be equal for another worker to continue a request of this task; called after load."""
        return ""

    def check(self, payload: Any) -> None:
        """Check a stored payload in the worker, before anything else is asked about it.

        Raises :class:`InvalidRequest`. What :meth:`memory_needed` makes of an invalid payload is no answer to its
        client.
        """

    def memory_needed(self, payload: Any) -> int | None:
        """Bytes of device memory that a request takes as long as it is admitted; ``None`` if nobody can tell.

        Asked before :meth:`admit`, with :meth:`memory_free`: a request for which there is too little waits until others
        have left; one for which there is too little alone fails with both numbers, kind ``GPU_OOM``.
        """
        return None

    def memory_free(self) -> int | None:
        """Bytes that are free for further requests; ``None`` if nobody can tell.

        What those that are admitted will still take, by :meth:`memory_needed`, is not free.
        """
        return None

    def probe(self) -> bool | None:
        """Whether this process can still compute; ``None`` if nobody can tell. Called with no request admitted.

        Asked after :meth:`step` has raised for a request that was alone, where no other request was stepped well
        since, and before a process is taken for broken: ``True`` charges the request, ``False`` (or raising) replaces
        the process. Requests that raise need no healthy one beside them then.
        """
        return None

    def admit(self, request: Request) -> None:
        """Take a request in, from its payload or from where its checkpoint left it."""
        raise NotImplementedError

    def step(self) -> Iterable[Step]:
        """Move the admitted requests on; one or more :class:`Step` for each that moved."""
        raise NotImplementedError

    def drop(self, request_id: str) -> None:
        """Forget a request. Unknown ids are ignored."""
        raise NotImplementedError


# An iterator of steps is what many write for a generator without a result.
GeneratorFunction = (
    Callable[[Request], Generator[Step, None, Any]]
    | Callable[[Request], Iterator[Step]]
    | Callable[[Request], AsyncGenerator[Step, None]]
    | Callable[[Request], AsyncIterator[Step]]
)
Function = TypeVar("Function", bound=GeneratorFunction)


class Task(FunctionTask):
    """A generator function that users may submit; calling it gives the generator, as before.

    Raises ``TypeError`` for a function that yields nothing. One that returns another one's generator says so by its
    annotation.
    """

    def __init__(
        self,
        function: GeneratorFunction,
        *,
        slots: int = 1,
        step_timeout: float | None = None,
        reproducible: bool = True,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}")
        if step_timeout is not None and not step_timeout > 0:
            raise ValueError(f"step_timeout must be a number of seconds above 0, not {step_timeout}")
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{function.__qualname__} is an async function without a yield: a task is a generator; have it "
                "`yield Step(...)` for each step, and `yield Step(result=...)` at the end"
            )
        if not (inspect.isasyncgenfunction(function) or _yields(function)):
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(
                f"{name} is not a generator: a task yields; have it `yield Step(...)` for each step, and return its "
                "result. If it returns a generator that another function makes, annotate it: `-> Iterator[Step]`"
            )
        functools.update_wrapper(self, function)
        self.asynchronous = inspect.isasyncgenfunction(function)
        """Its requests run on an event loop."""
        self.function = function
        self.slots = slots
        self.step_timeout = step_timeout
        self.reproducible = reproducible

    def __call__(self, request: Request) -> Any:  # the generator, or the async one
        return self.function(request)

    def __reduce__(self) -> str:
        # By its name, as functions are: that is how RQ stores what Queue.enqueue(task, ...) is given.
        path_of(self)
        return str(self.__qualname__)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"<task {self.__module__}.{getattr(self, '__qualname__', '?')}>"


def _yields(function: Any) -> bool:
    """Whether calling a function gives a generator, as far as that can be told without calling it."""
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner):
        inner = type(inner).__call__
    if inspect.isgeneratorfunction(inner):
        return True
    said = getattr(inner, "__annotations__", {}).get("return", "")
    return "Generator" in str(said) or "Itera" in str(said)


@overload
def task(function: GeneratorFunction, /) -> Task: ...
@overload
def task(
    *, slots: int = 1, step_timeout: float | None = None, reproducible: bool = True
) -> Callable[[GeneratorFunction], Task]: ...
def task(
    function: GeneratorFunction | None = None,
    /,
    *,
    slots: int = 1,
    step_timeout: float | None = None,
    reproducible: bool = True,
) -> Task | Callable[[GeneratorFunction], Task]:
    """Make a generator function, or an async one, a task.

    Each ``yield Step(...)`` is one step; the generator's ``return`` value is the request's result. An async
    generator cannot return a value: its last step is ``yield Step(result=...)``, which any generator may use.

    ``slots``: how many requests one worker runs at once. With one, a generator runs in the main thread of the
    worker. With more, each request has a thread for its whole execution; one that is slow, or hangs, holds no other
    up. Async generators all run on one event loop in a thread of its own. ``step_timeout``: seconds between two
    yields before the worker counts as hung (default: ``PERDURE_STEP_TIMEOUT``). ``reproducible``:
    whether a run from zero yields the same outputs again, so that a reader may skip what it has.
    """
    if function is not None:
        return Task(function)
    return functools.partial(Task, slots=slots, step_timeout=step_timeout, reproducible=reproducible)


AnyTask = Task | BatchTask | type[BatchTask]
