"""What a request holds for people: payload, outputs and result, as text that is cut where it is too long for a page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import redis

from ...protocol.codec import unpack, unpack_entry
from ...protocol.keys import key
from ...protocol.store import Store
from ..present.console import plain

TEXT: Final = 64 * 1024
"""Characters of each that are shown."""

ENTRIES: Final = 20
"""Entries at the end of an output log that are read at most; an entry is what one checkpoint stored."""

READ: Final = 1024 * 1024
"""Bytes: a larger payload is not read, and no further entry of the log once so many were."""


def contents(store: Store, identifier: str, *, finished: bool) -> dict[str, Any]:
    """``payload``, ``outputs`` and ``result`` as text, or ``None`` where there is none.

    ``first`` is the number of the first output that is shown.
    """
    outputs, first = _outputs(store.connection, identifier)
    return {
        "payload": _payload(store.connection, identifier),
        "outputs": _text(_joined(outputs)) if outputs else None,
        "first": first,
        "result": _read(lambda: store.result(identifier)) if finished else None,
    }


def _payload(connection: redis.Redis, identifier: str) -> str | None:
    name = key("job", identifier)
    size: Any = connection.hstrlen(name, "payload")
    if size > READ:
        return f"{size:,} bytes: too large to be shown here"
    raw: Any = connection.hget(name, "payload")
    return None if raw is None else _read(lambda: unpack(raw))


def _outputs(connection: redis.Redis, identifier: str) -> tuple[list[Any], int]:
    """The last outputs of the newest epoch, and the number of the first of them."""
    found: list[Any] = []
    first, epoch, read = 0, None, 0
    for place in range(1, ENTRIES + 1):
        raw: Any = connection.lindex(key("output", identifier), -place)
        read += len(raw or b"")
        try:
            its_epoch, offset, outputs = unpack_entry(raw or b"")
        except (ValueError, TypeError):
            break  # the beginning of the log, or what is no entry
        if epoch not in (None, its_epoch) or (found and offset + len(outputs) != first):
            break  # of an earlier run, or something is missing between
        epoch, first = its_epoch, offset
        found[:0] = outputs
        if read > READ:
            break
    return found, first


def _joined(outputs: list[Any]) -> Any:
    """The text of a generation, whose outputs are tokens with their text; anything else as it is."""
    pieces = [item.get("text") if isinstance(item, dict) else None for item in outputs]
    text = [piece for piece in pieces if isinstance(piece, str)]
    return "".join(text) if len(text) == len(outputs) else outputs


def _read(value: Callable[[], Any]) -> str:
    try:
        return _text(value())
    except (ValueError, TypeError) as error:
        return f"cannot be read: {error}"


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, indent=1, default=str)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= TEXT else f"{text[:TEXT]}… ({len(text) - TEXT:,} more characters)"
