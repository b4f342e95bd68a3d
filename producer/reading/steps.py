"""The steps of which :mod:`.questions` are made, and nothing of how they are done.

A question yields steps and is sent what came of them. Who drives it does the input and output:
:class:`~perdure.producer.Handle` in the calling thread, :class:`~perdure.producer.AsyncHandle` on an event loop. So
both ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from ...protocol.store import Store
from .replies import ReplyWatch


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read a request's record (or ``None``). ``deadline``: monotonic; ``None`` is the client's patience.

    ``ahead`` is for what was read along, if anything: a function that gives the result as ``Store.result`` does.
    """

    id: str
    deadline: float | None
    ahead: list[Callable[[], Any]] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Run an operation on a store."""

    operation: Callable[[Store], Any]
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """Begin to hear hints about a request whose producer is ``channel``; the answer is a :class:`ReplyWatch`.

    ``outputs``: also that there are new outputs, not only that it has ended.
    """

    id: str
    channel: str
    outputs: bool = False


@dataclass(frozen=True, slots=True)
class Hear:
    """As :class:`Join` for a request that this client has submitted itself; ``None`` if it does not listen yet."""

    id: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait for a hint, or so many seconds."""

    watch: ReplyWatch
    seconds: float


@dataclass(frozen=True, slots=True)
class Give:
    """An output for the caller."""

    output: Any


Step = Fetch | Call | Hear | Join | Sleep | Give
Answer = TypeVar("Answer")
Question = Generator[Step, Any, Answer]
