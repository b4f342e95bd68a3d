"""Tasks that leave something behind: threads, processes, hooks, output that nobody reads."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from perdure.workers import Request, Step, task

SLEEP = "import time; time.sleep(600)"


def wait() -> None:
    time.sleep(600)


def leave(what: str) -> None:
    """Leave it behind; a process writes its number into a file of its name."""
    if what == "thread":
        threading.Thread(target=wait).start()
    elif what == "hook":
        atexit.register(wait)
    elif what == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=wait)
        process.start()
        note(what, process.pid)
    elif what == "spawn":
        process = multiprocessing.get_context("spawn").Process(target=wait)  # type: ignore[assignment]
        process.start()
        note(what, process.pid)
    elif what == "subprocess":
        note(what, subprocess.Popen([sys.executable, "-c", SLEEP]).pid)
    elif what == "session":
        note(what, subprocess.Popen([sys.executable, "-c", SLEEP], start_new_session=True).pid)
    elif what == "bare":
        note(what, subprocess.Popen([sys.executable, "-c", SLEEP], env={}).pid)
    elif what == "grandchild":
        # Its parent ends at once: it is nobody's child any more.
        start = f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}], stdout=subprocess.DEVNULL)"
        code = f"import subprocess, sys; print({start}.pid)"
        note(what, int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout))
    elif what == "fork":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(600)
            os._exit(0)
        note(what, pid)


def note(what: str, pid: int | None) -> None:
    Path(f"{what}.new").write_text(str(pid))
    Path(f"{what}.new").rename(f"{what}.pid")


@task
def leaves(request: Request) -> Generator[Step, None, Any]:
    """Leaves what the payload names, and ends, or counts on."""
    for what in request.payload["what"]:
        leave(what)
    for index in range(request.payload.get("n", 1)):
        yield Step(output=index)
        time.sleep(0.05)


@task
def talks(request: Request) -> Generator[Step, None, Any]:
    """Logs more than any pipe holds, and goes on."""
    log = logging.getLogger("rq.worker")
    for index in range(len(request.outputs), request.payload["n"]):
        for _ in range(20):
            log.warning("x" * 1000)
        time.sleep(0.01)
        yield Step(output=index)
