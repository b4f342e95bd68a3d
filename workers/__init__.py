"""How requests are run: the RQ worker class and the tasks it runs.

Names are loaded on first use, so that the guardian, which imports a submodule of this package,
stays a small process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..protocol.errors import InvalidRequest
    from .rq.worker import Worker
    from .tasks.base import BatchTask, Request, Step, Unfit, task

__all__ = ["BatchTask", "InvalidRequest", "Request", "Step", "Unfit", "Worker", "task"]


def __getattr__(name: str) -> Any:
    if name == "Worker":
        from .rq.worker import Worker

        return Worker
    if name in __all__:
        from .tasks import base as tasks

        return getattr(tasks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
