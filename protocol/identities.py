"""Names that are made without asking anybody."""

from __future__ import annotations

import os
import time


def new_stem() -> str:
    """With what the execution ids of one claim begin (104 random bits); six digits follow, so that they have 32."""
    return os.urandom(13).hex()


def new_id() -> str:
    """A request id: sortable by the time of submit, unique without asking anybody (84 random bits)."""
    return f"{time.time_ns() // 1_000_000:011x}{os.urandom(11).hex()[1:]}"


def new_nonce() -> str:
    """What tells one submit from another of the same id (64 random bits)."""
    return os.urandom(8).hex()
