"""What a task raises when its process, and no request, is at fault."""

from __future__ import annotations

from .statuses import UNFIT


class Unfit(Exception):
    """The process cannot run the task any more, and none of its requests is to blame.

    Raised by ``step``: the worker hands back what it holds, uncharged and with its checkpoints, and exits with
    ``status``, to be replaced.
    """

    def __init__(self, message: str, status: int = UNFIT) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[Unfit], tuple[str, int]]:
        return type(self), (str(self), self.status)
