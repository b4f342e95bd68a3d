"""A plain job that waits until its test lets it go on."""

from __future__ import annotations

import time
from pathlib import Path


def hold(folder: str, word: str) -> str:
    """Say that it runs, wait for a file of this word, and return the word."""
    Path(folder, f"{word}.runs").touch()
    until = time.monotonic() + 60
    while not Path(folder, f"{word}.goes").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return word
