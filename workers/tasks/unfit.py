"""What a task raises when its process, and no request, is at fault."""

from __future__ import annotations

from ..pool.statuses import UNFIT


class Unfit(Exception):
    """The process cannot run the task any more, and none of its requests is to blame.

    Raised by any method of a task, by a generator, or given as a step's ``error``: the worker hands back what it holds,
    uncharged and with its checkpoints, and exits with ``status`` (1 to 255; 72 without one), to be replaced.
    """

    def __init__(self, message: str = "", status: int = UNFIT) -> None:
        super().__init__(message)
        # Status 0 would say that somebody had asked it to leave, and nobody would replace it.
        self.status = status if 0 < status < 256 else UNFIT

    def __reduce__(self) -> tuple[type[Unfit], tuple[str, int]]:
        return type(self), (str(self), self.status)
