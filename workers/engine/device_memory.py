"""What is done with a device's memory when it has run out: everything that still refers to it is let go first.

Torch is looked up only if somebody has imported it, and CUDA touched only if somebody uses it.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

from ...protocol.errors import PerdureError
from ...recovery.failures import describe


class DoesNotFit(PerdureError):
    """A request needs more memory than is free with nobody beside it."""


def does_not_fit(needed: int | None, free: int | None, error: BaseException | None = None) -> DoesNotFit:
    """What its producer is told: bytes needed and free, where they are known, and what the library said."""
    numbers = [
        f"{number:,} bytes {what}" for number, what in ((needed, "needed"), (free, "free")) if number is not None
    ]
    parts = ["it does not fit into the device's memory, with no other request beside it", ", ".join(numbers)]
    if error is not None:
        parts.append(describe(error))
    result = DoesNotFit("; ".join(part for part in parts if part))
    result.__cause__ = error
    return result


def forget(error: BaseException) -> None:
    """Let go of what the frames of an error, and of all that led to it, refer to: its traceback still prints.

    To be called outside of the handler: there the interpreter refers to them too, and what is freed then stays.
    """
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        link = todo.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        todo += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            todo += link.exceptions


def empty_caches() -> None:
    """Give the blocks that torch keeps for later back to the device: in other sizes, they may be what is missing."""
    cuda = _cuda()
    if cuda is not None:
        cuda.empty_cache()


def free_bytes() -> int | None:
    """Bytes free on the current CUDA device, with those that torch holds without using them; ``None`` without CUDA."""
    cuda = _cuda()
    if cuda is None:
        return None
    return int(cuda.mem_get_info()[0]) + int(cuda.memory_reserved()) - int(cuda.memory_allocated())


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None
