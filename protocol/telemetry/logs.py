"""Logs: text for people, or one JSON object a line for machines (``PERDURE_LOG_FORMAT``).

In JSON, every line says when, how bad, which logger and what, and beside the text in fields of their own: ``worker``
and ``device`` of the process, ``request`` and ``execution`` where the line is about one. Those two come from the call
that logs (``extra=about(…)``), or, for lines of a task's own code, from :func:`running`.

RQ's loggers go the same way. As text, they stay as RQ has set them up.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final

from .log_writer import unblock

FIELDS: Final = ("request", "execution", "worker", "device")

_TEXT: Final = "%(asctime)s %(name)s %(message)s"
_COLORS: Final = re.compile(r"\x1b\[[0-9;]*m")

_running: ContextVar[tuple[str, str]] = ContextVar("perdure_running", default=("", ""))


def about(request: str, execution: str = "", **more: str) -> dict[str, str]:
    """The ``extra`` of a line about one request."""
    return {"request": request, "execution": execution, **more}


def enter(request: str, execution: str) -> None:
    """From now on, lines that are logged in this context are about this execution."""
    _running.set((request, execution))


@contextmanager
def running(request: str, execution: str) -> Iterator[None]:
    """Lines that are logged within, by whichever code, are about this execution."""
    token = _running.set((request, execution))
    try:
        yield
    finally:
        _running.reset(token)


def traced(log: logging.Logger, level: int, traceback: str, message: str, *args: object, extra: dict[str, str]) -> None:
    """Log a line with a traceback that is a text already: below it as text, in a field of its own in JSON.

    Nothing in it can steer a terminal.
    """
    if not log.isEnabledFor(level):
        return
    record = log.makeRecord(log.name, level, __file__, 0, message, args, None, extra=extra)
    record.exc_text = "".join(mark if mark.isprintable() or mark in "\n\t" else " " for mark in traceback.rstrip())
    log.handle(record)


class JsonFormatter(logging.Formatter):
    """One line for each record, whatever stands in it. ``context``: fields that all lines of this process have."""

    def __init__(self, **context: str) -> None:
        super().__init__()
        self._context = {name: value for name, value in context.items() if value}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _COLORS.sub("", _message(record)),
            "pid": record.process,
            **self._context,
        }
        request, execution = _running.get()
        if request:
            line |= {"request": request, "execution": execution}
        for name in FIELDS:
            # Somebody else's record may have any object under such a name.
            said: object = getattr(record, name, None)
            if isinstance(said, str) and said:
                line[name] = said
        if record.exc_info:
            line["error"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        elif record.exc_text:
            line["error"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, ensure_ascii=False)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # arguments that do not fit: the line is kept, as far as it goes
        return f"{record.msg!s} ({type(error).__name__} in its arguments)"


def configure(log_format: str, *, date_format: str | None = "%H:%M:%S", **context: str) -> None:
    """Set up the logs of a process of ours, from INFO on, to standard error; a reader that stops holds nobody up."""
    if not wants_json(log_format):
        logging.basicConfig(level=logging.INFO, format=_TEXT, datefmt=date_format)
    else:
        _to_root(context)
        logging.getLogger().setLevel(logging.INFO)
    unblock()


def take_over(log_format: str, **context: str) -> None:
    """In a process of RQ's: have its loggers, and all others, write JSON, if that is wanted.

    Levels stay as they are. RQ adds handlers of its own only where it finds none.
    """
    if not wants_json(log_format):
        return
    _to_root(context)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and (name == "rq" or name.startswith("rq.")):
            logger.handlers.clear()
            logger.propagate = True


def wants_json(log_format: str) -> bool:
    """Whether a process that prints to this standard error prints JSON."""
    return log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())


def _to_root(context: dict[str, str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**context))
    logging.getLogger().handlers[:] = [handler]
