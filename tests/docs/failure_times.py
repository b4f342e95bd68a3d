"""How long each failure takes until the request goes on elsewhere, with every setting at its default.

Run it from the checkout, on a machine with nothing else to do; it takes about six minutes::

    .venv/bin/python -m tests.docs.failure_times

It prints the median and the worst of so many runs, in seconds, for the table in docs/failures.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perdure.protocol.keys import key
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually, gone, laboratory, send

Measure = Callable[[Lab, Server], float]


def clock(lab: Lab) -> float:
    seconds, micros = lab.connection.time()
    return float(seconds) + float(micros) / 1e6


def since_next_step(lab: Lab, name: str, begin: float, first: str) -> float:
    """Seconds from ``begin`` until an execution other than ``first`` has stored a step; both by the server's clock."""

    def stored() -> float:
        row: Any = lab.connection.hmget(key("job", name), "execution", "claimed")
        execution, claimed = row
        at = lab.connection.hget(key("checkpoint", name), "at")
        if not execution or execution.decode() == first or float(at or 0) <= float(claimed or 0):
            return 0.0
        return float(at or 0) / 1000

    return eventually(stored, 120) - begin


def _running(lab: Lab) -> str:
    name = lab.submit("count", {"n": 100_000, "sleep": 0.02})
    lab.moved(name, 10)
    return name


def worker(lab: Lab, server: Server) -> float:
    """SIGKILL of the worker process alone; another one is idle."""
    first = lab.worker()
    name = _running(lab)
    lab.worker()
    begin, holding = clock(lab), lab.record(name).execution
    first.kill()
    return since_next_step(lab, name, begin, holding)


def crash(lab: Lab, server: Server) -> float:
    """A native crash of the worker, the first of this request: its retry waits a second."""
    lab.worker()
    lab.worker()
    name = lab.submit("crash_tasks.fork", {})
    lab.moved(name, 1)
    holder = next(process for process in lab.processes if process.name == lab.record(name).worker)
    begin, holding = clock(lab), lab.record(name).execution
    holder.send(signal.SIGSEGV)
    return since_next_step(lab, name, begin, holding)


def host(lab: Lab, server: Server) -> float:
    """SIGKILL of worker and guardian at once, as when their host is lost; a reaper runs."""
    lab.reaper(reap_interval=0.5)
    return _host(lab)


def host_without_a_reaper(lab: Lab, server: Server) -> float:
    """The same, and every reaper is gone too."""
    reaper = lab.reaper(reap_interval=0.5)
    reaper.kill()
    return _host(lab)


def _host(lab: Lab) -> float:
    first = lab.worker()
    name = _running(lab)
    lab.worker()
    # Nobody is judged within one heartbeat timeout of the first sweep.
    begin = clock(lab)
    eventually(lambda: clock(lab) - begin > 8)
    begin, holding = clock(lab), lab.record(name).execution
    first.kill_tree()
    return since_next_step(lab, name, begin, holding)


def guardian(lab: Lab, server: Server) -> float:
    """SIGKILL of the guardian: until another one runs."""
    process = lab.worker()
    (first,) = process.children()
    begin = time.monotonic()
    send(first, signal.SIGKILL)
    eventually(lambda: [pid for pid in process.children() if pid != first and not gone(pid)])
    return time.monotonic() - begin


def redis_killed(lab: Lab, server: Server) -> float:
    """SIGKILL of Redis, restarted at once: from its first answer to the next stored output."""
    lab.reaper(reap_interval=0.5)
    lab.worker()
    name = _running(lab)
    server.kill()
    server.restart()
    return _stored_after(lab, name, clock(lab))


def _stored_after(lab: Lab, name: str, begin: float) -> float:
    def at() -> float:
        stored = float(lab.connection.hget(key("checkpoint", name), "at") or 0) / 1000
        return stored if stored > begin else 0.0

    return eventually(at, 60) - begin


def redis_frozen(lab: Lab, server: Server) -> float:
    """Redis stands still for 10 s: the same."""
    lab.reaper(reap_interval=0.5)
    lab.worker()
    name = _running(lab)
    os.kill(server.pid, signal.SIGSTOP)
    begin = time.monotonic()
    eventually(lambda: time.monotonic() - begin > 10)
    os.kill(server.pid, signal.SIGCONT)
    return _stored_after(lab, name, clock(lab))


def drain(lab: Lab, server: Server) -> float:
    """SIGTERM to the worker: until its request goes on elsewhere."""
    first = lab.worker()
    name = _running(lab)
    lab.worker()
    begin, holding = clock(lab), lab.record(name).execution
    first.send(signal.SIGTERM)
    return since_next_step(lab, name, begin, holding)


def hang(lab: Lab, server: Server) -> float:
    """A step that holds the interpreter's lock for ever: until the request goes on elsewhere. A step timeout, and the
    second before its retry.
    """
    lab.reaper(reap_interval=0.5)
    lab.worker()
    name = lab.submit("hang_tasks.alone", {"folder": str(lab.folder), "how": "native", "sleep": 0.1})
    eventually((lab.folder / f"hung-{name}").exists)
    begin, holding = clock(lab), lab.record(name).execution
    lab.worker()
    return since_next_step(lab, name, begin, holding)


MEASURES: tuple[tuple[Measure, int], ...] = (
    (worker, 5), (crash, 5), (drain, 5), (host, 5), (host_without_a_reaper, 5), (guardian, 5), (redis_killed, 5),
    (redis_frozen, 5), (hang, 5),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these")
    names = parser.parse_args().names
    for measure, runs in MEASURES:
        if names and measure.__name__ not in names:
            continue
        figures = []
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                with Server(place / "redis") as server, laboratory(server.url, place) as lab:
                    lab.settings = {}
                    figures.append(measure(lab, server))
        print(
            f"{measure.__name__:24} median {statistics.median(figures):6.2f}  worst {max(figures):6.2f}  of {runs}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
