"""Inference requests that outlive the workers running them: a worker pool on Redis and RQ with durable checkpoints.

What most programs need stands here; each name is loaded on first use, so that ``import perdure`` costs nothing::

    from perdure import Client, Step, task

:mod:`perdure.producer` and :mod:`perdure.workers` have the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .producer import AsyncClient, Client
    from .workers import BatchTask, Step, Worker, task

__version__ = "0.3.0.dev0"

__all__ = ["Client", "AsyncClient", "task", "Step", "BatchTask", "Worker", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Client", "AsyncClient"):
        return getattr(importlib.import_module(".producer", __name__), name)
    if name in __all__:
        return getattr(importlib.import_module(".workers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
