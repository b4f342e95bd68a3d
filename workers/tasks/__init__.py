"""What users write, and how each kind of it is run.

:mod:`perdure.workers` has the names that users need; this path of them stays for what imports it.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Only when asked for: the guardian imports other modules of this folder.
    try:
        return getattr(importlib.import_module(".base", __name__), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
