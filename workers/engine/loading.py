"""The tasks that this worker has loaded, each with its engine, and those that it could not load."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ...protocol.settings import Settings
from ...protocol.tasks import resolve
from ...protocol.transitions.calls import Claim
from ..guardian.watchdog import WAIT, Watchdog
from ..leases.holdings import Holdings
from ..leases.mailbox import News
from ..tasks.base import AnyTask
from ..tasks.forks import foreign
from ..tasks.members import Members
from .admissions import Admissions
from .engines import Engine, as_batch
from .unable import BROKEN, Unable


@dataclass(slots=True)
class Engines:
    """All engines of this worker, of which one runs."""

    holdings: Holdings
    settings: Settings
    watchdog: Watchdog
    admissions: Admissions
    log: logging.Logger
    shown: Callable[[list[str]], None]
    """Called with all fingerprints when another task has been loaded."""
    broken: Callable[[str, BaseException], None]
    """Called with a task that could not be loaded."""
    find: Callable[[str], AnyTask] = resolve
    unable: Unable = field(default_factory=Unable)
    loaded: dict[str, Engine] = field(default_factory=dict)
    """By the path of its task."""
    current: Engine | None = None
    """The one that runs."""

    def switch(self, path: str) -> Engine:
        """The engine of a task, which runs from now on. Raises what loading raises."""
        engine = self.loaded.get(path) or self.load(path)
        if engine is not self.current:
            self.current = engine
            engine.changed = True
            self.holdings.set_apart(engine.batch.computing if isinstance(engine.batch, Members) else None)
        return engine

    def load(self, path: str) -> Engine:
        """Load a task. Raises what loading raises."""
        began = time.monotonic()
        self.holdings.loading(self.settings.load_timeout)
        self.watchdog.tick(self.settings.load_timeout)
        if path in self.unable.found:
            importlib.invalidate_caches()  # a module may have been put there since
        try:
            with foreign:
                batch = as_batch(self.find(path), lambda: self.holdings.mailbox.put(News()))
                batch.load()
                engine = Engine(path, batch, batch.fingerprint())
        finally:
            self.watchdog.tick(self.holdings.longest_step() + WAIT)
            self.holdings.loading(0)
        self.loaded[path] = engine
        self.unable.loaded(path)
        self.log.info("loaded %s in %.1f s, %d slot(s)", path, time.monotonic() - began, batch.slots)
        self.shown([item.fingerprint for item in self.loaded.values() if item.fingerprint])
        if self.current is None:
            self.admissions.tell_room(engine)  # before the first claim
        self.holdings.capacity.loaded(path, batch.slots, batch.step_timeout)
        return engine

    def cannot_load(self, claim: Claim, error: BaseException) -> None:
        """Leave the task to others for a while. A sweep finds that nobody can (:mod:`perdure.recovery.unserved`)."""
        self.broken(claim.task, error)  # first: who hears of it may mend it at once
        found = self.unable.failed(claim.task, error)
        self.log.error(
            "cannot load %s (%s); its requests are handed back, and left to others for %.0f s",
            claim.task,
            found.reason,
            found.until - time.monotonic(),
            exc_info=error if found.kind == BROKEN else None,
        )
        reason = f"a worker could not load {claim.task}: {found.reason}"
        self.holdings.hand_back(claim, reason=reason, delay=0.0, unable=True)

    def count_slots(self) -> None:
        """A step that cannot be ended takes a slot of its task for as long as it runs."""
        for engine in self.loaded.values():
            if isinstance(engine.batch, Members):
                self.holdings.capacity.resize(engine.path, engine.batch.free_slots)
