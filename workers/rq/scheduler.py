"""RQ's scheduler as a process of its own: what ``--with-scheduler`` starts.

RQ forks its scheduler, and with it the worker's sockets: when the worker is killed, Redis still hands jobs to
its connection. This one is spawned, connects by itself, and ends with its worker, whichever way that ends.

The module is both sides: :class:`SchedulerProcess` is the worker's, :func:`main` is the process.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import redis
from rq.scheduler import RQScheduler
from rq.scheduler import run as run_scheduler

from ...protocol.telemetry import logs
from ..guardian import kin
from ..guardian.companion import RESTART_INTERVAL, portable, rebuild

LAST_EFFORT = 5.0
"""Seconds for a scheduler whose worker is gone to give its locks back; they run out by themselves as well."""

TAKE_OVER = timedelta(seconds=10)
"""How often a scheduler asks for queues that another one serves."""


@dataclass(slots=True)
class SchedulerProcess:
    """Keeps one scheduler process beside this worker; its standard input ends when the worker does."""

    connection: redis.Redis
    name: str
    queues: Sequence[str]
    serializer: Any
    level: str | int | None = None
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    _process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0

    def start(self) -> None:
        """Start the process. Under its old name it has its locks again at once."""
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, start_new_session=True, env=kin.environment()
        )
        message = {
            "connection": portable(self.connection), "name": self.name, "queues": list(self.queues),
            "serializer": dotted(self.serializer), "level": self.level or "INFO", "path": sys.path, "pid": os.getpid(),
        }  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; tend() will see it

    def tend(self) -> None:
        """Start another one if it is gone. Cheap: for every round."""
        process = self._process
        if process is not None and process.poll() is not None and time.monotonic() - self._started >= RESTART_INTERVAL:
            self.log.warning("the scheduler (pid %d) is gone; starting another", process.pid)
            self.start()

    def stop(self) -> None:
        """Let it end, without waiting for it."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            try:
                process.stdin.close()
            except OSError:
                pass  # it was gone already


def dotted(serializer: Any) -> str:
    """The dotted path of an RQ serializer, as RQ itself takes it."""
    named = serializer if isinstance(serializer, type) else type(serializer)
    return f"{named.__module__}.{named.__qualname__}"


class Scheduler(RQScheduler):
    """RQ's, but it takes over the queues of a scheduler that is gone within seconds, not ten minutes."""

    @property
    def should_reacquire_locks(self) -> bool:
        if self._queue_names == self.acquired_locks:
            return False
        last: Any = self.lock_acquisition_time
        return last is None or datetime.now() - last > TAKE_OVER

    def _install_signal_handlers(self) -> None:
        """None: in a session of its own, it ends with its worker, and a plain SIGTERM ends it at once."""


def move_due(connection: redis.Redis, queues: Sequence[str], serializer: Any) -> None:
    """Move what is due to its queue, once; queues that another scheduler serves are left to it."""
    scheduler = Scheduler(queues, connection=connection, serializer=serializer, logging_level="WARNING")
    scheduler.acquire_locks()  # type: ignore[no-untyped-call]
    scheduler.enqueue_scheduled_jobs()  # type: ignore[no-untyped-call]
    scheduler.release_locks()  # type: ignore[no-untyped-call]


def main() -> int:
    """Read the first line of standard input, then move due jobs until its end."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    config: dict[str, Any] = json.loads(line)
    # A serializer of the user's own may lie where only the worker looks.
    sys.path.extend(entry for entry in config["path"] if entry not in sys.path)
    logs.take_over(os.environ.get("PERDURE_LOG_FORMAT", "text"))
    scheduler = Scheduler(
        config["queues"],
        connection=rebuild(config["connection"], timeout=10.0),
        name=config["name"],
        serializer=config["serializer"],
        logging_level=config["level"],
    )

    handles = [sys.stdin.fileno()]
    try:
        # A child that the worker forked may keep its end of the pipe open; the process itself does not lie.
        handles.append(os.pidfd_open(config["pid"]))
    except (AttributeError, OSError):
        pass  # not Linux, or the worker is gone already, which the pipe will tell

    def follow() -> None:
        select.select(handles, [], [])  # until the worker is gone
        scheduler.request_stop()  # type: ignore[no-untyped-call]
        time.sleep(LAST_EFFORT)
        os._exit(0)

    threading.Thread(target=follow, name="follow", daemon=True).start()
    try:
        run_scheduler(scheduler)
    except redis.RedisError:
        return 1  # RQ has logged it; the worker starts another
    return 0


if __name__ == "__main__":
    sys.exit(main())
