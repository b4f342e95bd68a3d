"""Jobs and workers of RQ's own that take their time, for tests that come in between."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rq import Worker


def hold(folder: str, word: str) -> str:
    """Say that it runs, wait for a file of this word, and return the word."""
    Path(folder, f"{word}.runs").touch()
    until = time.monotonic() + 60
    while not Path(folder, f"{word}.goes").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return word


class SlowStock(Worker):
    """RQ's own worker, whose horse has a request for a minute before it looks what it is."""

    def prepare_job_execution(self, *args: Any, **options: Any) -> None:
        super().prepare_job_execution(*args, **options)
        time.sleep(60)
