"""How a request gets in, and its answer out.

::

    with Client() as client:
        handle = client.submit("app.tasks.count", {"n": 3}, queue="gpu")
        for output in handle.stream():
            ...
        handle.result()

``as_completed(handles)`` yields handles as their requests end.

Neither torch nor any task of a user is imported from here.
"""

from .client import Client
from .gathering import as_completed
from .handle import Handle

__all__ = ["Client", "Handle", "as_completed"]
