"""The options of a submit: their names, types, defaults, checks and descriptions, here and nowhere else.

:func:`taking` gives methods their signature and documentation from the dataclasses below. ``perdure submit`` takes its
flags from them, items of ``submit_many`` are checked by them, and :meth:`Options.stored` makes what is sent.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from ..protocol.errors import InvalidRequest
from ..protocol.keys import Priority, check_queue, with_priority
from ..protocol.settings import Settings
from ..protocol.tasks import TaskLike
from .arguments import Seconds, delayed, due, flag, kept, lasting, packed_meta, stepping, whole

P = ParamSpec("P")
T = TypeVar("T")
Asked = TypeVar("Asked")
Owner = TypeVar("Owner")
Answer = TypeVar("Answer")

_MOST_RETRIES = 1000


def _option(
    help: str, check: Callable[[Any, str], object] | None = None, *, setting: bool = False, of_call: bool = False
) -> dict[str, Any]:
    """What is known of a field. The first sentence of ``help`` is that of the command's flag.

    ``check`` takes value and name and gives what ``NewRequest`` has under that name, or raises; options without one
    are checked together with others, in ``submission.py``. ``setting``: ``None`` is the setting of that name.
    ``of_call``: it belongs to the whole call, and not to a single request of several.
    """
    return {"help": help, "check": check, "setting": setting, "of_call": of_call}


def _retries(value: object, name: str) -> int:
    return whole(value, name, 0, _MOST_RETRIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Options that the requests of one call may share."""

    queue: str = field(
        default="default",
        metadata=_option(
            "the queue it waits in. A worker that serves it must be running sooner or later; none is needed now."
        ),
    )
    priority: Priority = field(
        default="normal",
        metadata=_option(
            "its place among others: high, normal or low. ``high`` and ``low`` wait in queues of their own, "
            "``<queue>-high`` and ``<queue>-low``. A worker for ``<queue>`` takes from the three strictly in that "
            "order: while there is always something of a higher priority, nothing of a lower one runs. So that this "
            "does not starve, keep ``high`` rare, or run some workers with the order turned round "
            "(``rq worker … gpu-low gpu``). A degraded pool refuses ``low``."
        ),
    )
    delay: Seconds = field(
        default=0,
        metadata=_option("enqueue it after this many seconds. Its status is ``scheduled`` until then.", delayed),
    )
    deadline: Seconds | datetime | None = field(
        default=None,
        metadata=_option(
            "fail it if it has not ended after this many seconds. In Python it may also be a date with a time "
            "zone. It is ended as failed, kind ``DEADLINE``, and ``result()`` raises ``DeadlineExceeded``: "
            "waiting within a second, running when its worker next writes. Where no worker and no reaper runs, "
            "whoever waits for it ends it while it waits, and gets ``TimeoutError`` some seconds later while it "
            "runs. It is not retried; an answer that comes first wins. Seconds count twice at the submit to a "
            "degraded pool.",
            due,
        ),
    )
    queue_timeout: Seconds | None = field(
        default=None,
        metadata=_option(
            "fail it if no worker has claimed it after this many seconds. It ends as at a deadline.",
            lasting,
        ),
    )
    durable: bool = field(
        default=False,
        metadata=_option(
            "return only once the request is on disk. This is ``WAITAOF``; it takes about a second with Redis' "
            "default ``appendfsync everysec``.",
            flag,
        ),
    )
    meta: Mapping[str, Any] | None = field(
        default=None,
        metadata=_option(
            "a dict to store with it, for people and RQ's tools. ``Job.fetch(id).meta`` shows it, tasks do not see it.",
            packed_meta,
        ),
    )
    step_timeout: Seconds | None = field(
        default=None,
        metadata=_option(
            "seconds that one step of this request may take. It is the time between two signs of life while it "
            "runs, the steps of those that share its worker included, and replaces the task's and "
            "``PERDURE_STEP_TIMEOUT``. After one and a half times as long the request counts as hung and goes on "
            "elsewhere.",
            stepping,
        ),
    )
    degraded: Mapping[str, Any] | None = field(
        default=None,
        metadata=_option(
            "fields that replace those of the payload while the pool is degraded. A pool is degraded when it has "
            'lost too many workers; what counts is when the request begins. Example: ``{"max_tokens": 50}``. A '
            "request that began with them continues with them."
        ),
    )
    max_retries: int | None = field(
        default=None,
        metadata=_option(
            "retries after failures of its own. Losses of workers are not counted.", _retries, setting=True
        ),
    )
    result_ttl: Seconds | None = field(
        default=None,
        metadata=_option("seconds to keep a finished request, its outputs and result.", kept, setting=True),
    )
    failure_ttl: Seconds | None = field(
        default=None, metadata=_option("seconds to keep a failed or canceled request.", kept, setting=True)
    )
    retry_when_degraded: bool = field(
        default=False,
        metadata=_option(
            "retry while a degraded pool refuses low priority. It tries until the request is taken, for as long as the "
            "client's patience, and only then raises ``Degraded``.",
            of_call=True,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Common):
    """All options of one request. What is wrong is told by :meth:`stored`, or where the request is made."""

    id: str | None = field(
        default=None, metadata=_option("an id of your own: letters, digits, '_' and '-'. Each can be used once.")
    )
    idempotency_key: str | None = field(
        default=None,
        metadata=_option(
            "submit only once: the same key with the same task and payload gives the same request. Submitted "
            "again while the first request is kept, it gives a handle of that one, whatever has become of it and "
            "whatever the other options say. Keys are those of the whole pool, not of a queue."
        ),
    )

    @classmethod
    def of(cls, common: Common) -> Self:
        """The same, for a single request."""
        return cls(**{item.name: getattr(common, item.name) for item in fields(Common)})

    def changed(self, options: Mapping[str, Any]) -> Self:
        """With these of a single request instead. Raises :class:`InvalidRequest` for what is no option of one."""
        for name in options:
            if name not in OF_ONE:
                near = difflib.get_close_matches(str(name), OF_ONE, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OF_ONE)}"
                raise InvalidRequest(f"{name!r} is not an option of a request; {hint}", str(name))
        return replace(self, **options)

    def stored(self, settings: Settings) -> dict[str, Any]:
        """What ``NewRequest`` takes of them, by its names. Raises :class:`InvalidRequest` with the option's name."""
        values: dict[str, Any] = {"queue": with_priority(check_queue(self.queue), self.priority)}
        for name, check, setting in _CHECKED:
            value = getattr(self, name)
            if value is None and setting:
                value = getattr(settings, name)
            values[name] = check(value, name)
        values["deadline"], values["deadline_at"] = values["deadline"]
        return values


# Once: every submit goes through them.
_CHECKED = tuple(
    (item.name, item.metadata["check"], item.metadata["setting"]) for item in fields(Options) if item.metadata["check"]
)

OF_ONE = tuple(item.name for item in fields(Options) if not item.metadata["of_call"])
"""Options that one request of several may have."""


@dataclass(frozen=True, slots=True)
class Submit(Options):
    """What ``submit`` takes."""

    task: TaskLike | str = field(metadata={"help": "a task, or its dotted path, which is not imported."})
    payload: Any = field(metadata={"help": "None, bool, 64-bit int, float, str, bytes, list and dict."})


@dataclass(frozen=True, slots=True)
class SubmitMany(Common):
    """What ``submit_many`` takes."""

    items: Iterable[Any] = field(
        metadata={
            "help": "each is ``(task, payload)``, or a dict with ``task``, ``payload`` and any option of a request."
        }
    )


def taking(
    asked: Callable[P, Asked],
) -> Callable[[Callable[[Owner, Asked], Answer]], Callable[Concatenate[Owner, P], Answer]]:
    """A method that takes the fields of the dataclass ``asked`` as its arguments, and is given one of that class.

    Type checkers know the arguments from the class' constructor. At runtime the method has the same signature, and
    their descriptions stand in its docstring, in front of what it raises.
    """

    def decorate(method: Callable[[Owner, Asked], Answer]) -> Callable[Concatenate[Owner, P], Answer]:
        call: Any
        if inspect.iscoroutinefunction(method):

            async def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Any:
                return await method(self, asked(*args, **kwargs))
        else:

            def call(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Any:
                return method(self, asked(*args, **kwargs))

        own, taken = inspect.signature(method), inspect.signature(asked)
        functools.update_wrapper(call, method)
        call.__signature__ = own.replace(parameters=[own.parameters["self"], *taken.parameters.values()])
        call.__doc__ = _described(inspect.getdoc(method) or "", asked)
        return call  # type: ignore[no-any-return]

    return decorate


def _described(text: str, asked: Any) -> str:
    described = {item.name: item.metadata["help"] for item in fields(asked)}
    lines = [
        textwrap.fill(
            f"{name}: {described[name]}",
            112,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for name in inspect.signature(asked).parameters
    ]
    begin, raises, rest = text.partition("Raises:")
    return begin.rstrip() + "\n\nArgs:\n" + "\n".join(lines) + ("\n\n" + raises + rest if raises else "")


def sentence(item: Field[Any]) -> str:
    """The first sentence of an option's description, for a line of a command's help."""
    first = item.metadata["help"].partition(". ")[0].rstrip(".").replace("``", "")
    return f"{first[0].upper()}{first[1:]}."


# Python names them when an argument is missing, unknown or too many.
Submit.__init__.__qualname__ = "submit"
SubmitMany.__init__.__qualname__ = "submit_many"
