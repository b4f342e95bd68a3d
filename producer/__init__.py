"""How a request gets in, and its answer out.

::

    with Client() as client:
        handle = client.submit("app.tasks.count", {"n": 3}, queue="gpu")
        for output in handle.stream():
            ...
        handle.result()

Neither torch nor any task of a user is imported from here.
"""

from .client import Client
from .handle import Handle

__all__ = ["Client", "Handle"]
