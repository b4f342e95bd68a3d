"""The ``perdure`` command as a person calls it: the installed script, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PERDURE = str(Path(sys.executable).with_name("perdure"))
PATH = "app.tasks.count"
LONG = 60.0

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def call(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PERDURE, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done
