"""How a request gets in, and its answer out.

::

    with Client() as client:
        handle = client.submit("app.tasks.count", {"n": 3}, queue="gpu")
        for output in handle.stream():
            ...
        handle.result()

``AsyncClient`` is the same for event loops: ``await client.submit(…)``, ``async for output in handle.stream()``,
``await handle``. ``as_completed(handles)`` and ``as_completed_async(handles)`` yield handles as their requests end.

Neither torch nor any task of a user is imported from here.
"""

from typing import TYPE_CHECKING, Any

from .client import Client
from .handle import Handle, as_completed

if TYPE_CHECKING:
    from .async_client import AsyncClient, AsyncHandle, as_completed_async

__all__ = ["Client", "Handle", "AsyncClient", "AsyncHandle", "as_completed", "as_completed_async"]


def __getattr__(name: str) -> Any:
    # Only who has an event loop pays for it.
    if name in __all__:
        from . import async_client

        return getattr(async_client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
