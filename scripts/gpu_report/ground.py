"""A Redis and a pool for a step, as ``perdure up`` has them, and what is asked of both."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...producer import Client
from ...protocol.connection import connect
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...workers.pool.gpus import Gpu
from ..pool.pool import Pool
from ..pool.server import Server
from .stage import StepFailed

QUEUE: Final = "gpu"
PATIENCE: Final = 120.0
"""Seconds after which nothing is waited for any more; on a device the time-out of the step comes first."""

ENDED: Final = ("redelivered", "retry")
"""Events with which an execution was taken from a worker."""


@dataclass(frozen=True, slots=True)
class Ground:
    """A running pool."""

    store: Store
    client: Client
    pool: Pool
    log: Path

    def wait(self, what: str, question: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """The first true answer. Raises :class:`StepFailed`, with the end of the pool's log."""
        deadline = time.monotonic() + seconds
        while not (answer := question()):
            if time.monotonic() > deadline:
                end = "\n".join(self.text().splitlines()[-15:])
                raise StepFailed(f"{what} did not come within {seconds:g} s; the end of the log:\n{end}")
            time.sleep(0.01)
        return answer

    def workers(self, *, spare: bool = False) -> list[dict[str, Any]]:
        """Workers that claim, or spares that wait."""
        rows = [row for row in self.store.workers() if row["dead_in"] > 0]
        return [row for row in rows if (row["spare"] and not row["ready"] if spare else row["ready"])]

    def text(self) -> str:
        """What the pool has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def loads(self) -> list[float]:
        """Seconds that loading a task took, for each process in the order of their ends."""
        return [float(seconds) for seconds in re.findall(r"loaded \S+ in ([\d.]+) s", self.text())]

    def count(self, task: str, payloads: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """Submit, wait until all have ended, and return their outputs. Raises :class:`StepFailed` for
        one that failed.
        """
        handles = self.client.submit_many([(task, payload) for payload in payloads], queue=QUEUE)
        names = [handle.id for handle in handles]
        self.wait("the end of all requests", lambda: all(self.record(name).ended for name in names))
        for name in names:
            if self.record(name).status != "finished":
                raise StepFailed(f"a request ended as {self.record(name).status}: {self.store.history(name)}")
        return [self.store.all_outputs(name) for name in names]

    def record(self, name: str) -> Any:
        """A request as Redis has it."""
        record = self.store.fetch(name)
        if record is None:
            raise StepFailed(f"request {name} is gone")
        return record


@contextmanager
def ground(folder: Path, settings: Settings, *, spares: int = 0, gpus: Sequence[Gpu] = ()) -> Iterator[Ground]:
    """One worker, so many spares and a reaper, in a folder; all are loaded. Nothing of it is left afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "pool.log"
    with Server(folder / "redis", die_with_parent=True) as server:
        pool = Pool(server.url, [QUEUE], 1, settings, output=log, spares=spares, gpus=gpus)
        with Client(server.url, settings=settings) as client, connect(server.url) as connection:
            found = Ground(Store(connection, settings), client, pool, log)
            pool.start()
            try:
                found.wait("the worker", found.workers)
                found.wait("the spare", lambda: len(found.workers(spare=True)) >= spares)
                yield found
            finally:
                pool.stop()
