"""The steps of which :mod:`.questions` are made, and nothing of how they are done.

A question yields steps and is sent what came of them. Who drives it does the input and output:
:class:`~perdure.producer.Handle` in the calling thread, :class:`~perdure.producer.AsyncHandle` on an event loop. So
both ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

from ...protocol.reading.output_log import LogPlace
from ...protocol.store import Store
from .watches import ReplyWatch


class Fetch(NamedTuple):
    """Read a request's record (or ``None``). ``deadline``: monotonic; ``None`` is the client's patience.

    ``ahead`` is for what was read along, if anything: a function that gives the result as ``Store.result`` does.
    """

    id: str
    deadline: float | None
    ahead: list[Callable[[], Any]] | None = None


class Call(NamedTuple):
    """Run an operation on a store."""

    operation: Callable[[Store], Any]
    deadline: float | None = None


class Read(NamedTuple):
    """Read the page of a log behind a place. ``check``: of ``read_page`` in ``protocol/reading/output_log.py``."""

    id: str
    place: LogPlace
    deadline: float | None
    check: bool = False


class Join(NamedTuple):
    """Begin to hear hints about a request whose producer is ``channel``; the answer is a :class:`ReplyWatch`.

    ``outputs``: also that there are new outputs, not only that it has ended.
    """

    id: str
    channel: str
    outputs: bool = False


class Hear(NamedTuple):
    """As :class:`Join` for a request that this client has submitted itself; ``None`` if it does not listen yet."""

    id: str


class Sleep(NamedTuple):
    """Wait for a hint (:meth:`ReplyWatch.wait`). The answer may be the page at ``place``; else it is ``None``."""

    watch: ReplyWatch
    silence: float
    most: float
    place: LogPlace | None = None
    deadline: float = 0.0


class Give(NamedTuple):
    """Outputs for the caller, one by one."""

    outputs: list[Any]


Step = Fetch | Call | Read | Hear | Join | Sleep | Give
Answer = TypeVar("Answer")
Question = Generator[Step, Any, Answer]
