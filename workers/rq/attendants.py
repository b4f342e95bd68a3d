"""What runs beside a worker: its guardian, RQ's scheduler, and the threads that act on notes about ended requests."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from rq.worker import SimpleWorker, WorkerStatus

from ...protocol.settings import Settings
from ...protocol.telemetry.log_writer import unblock
from ..guardian.companion import Companion, Guarded, private_connection
from ..pool.standby import StandBy
from ..tasks.sources import Loaded
from .arrival import patience
from .dependents import Dependents
from .notices import LAST_PATIENCE, Notices
from .scheduler import SchedulerProcess, move_due


@dataclass(slots=True)
class Attendants:
    """Starts, looks after and ends them."""

    worker: SimpleWorker
    companion: Companion
    dependents: Dependents
    notices: Notices
    scheduler: SchedulerProcess | None
    sources: Loaded = field(default_factory=Loaded)
    blocked: list[Callable[[], None]] = field(default_factory=list)
    """What makes the handlers of logs as they were before."""

    @classmethod
    def of(cls, worker: SimpleWorker, settings: Settings, scheduler: SchedulerProcess | None) -> Attendants:
        """Those of a worker. Nothing is started but the scheduler, which is already there if there is one."""
        names = worker.queue_names()
        companion = Companion(worker.connection, settings, worker.name, names, device=_device(settings))
        own = [private_connection(worker.connection, timeout=patience(settings)) for _ in range(2)]
        kinds = worker.queue_class, worker.job_class, worker.serializer
        dependents = Dependents(own[0], names, *kinds, worker.log)
        notices = Notices(own[1], worker.job_class, worker.serializer, worker._exc_handlers, worker.log)
        return cls(worker, companion, dependents, notices, scheduler)

    def start(self, *, burst: bool) -> None:
        """Start the threads. A burst enqueues dependents by itself: it has no time to wait for them."""
        if not burst:
            self.dependents.start()
        self.notices.start()

    def stand_by(self, tended: Callable[[], bool]) -> None:
        """Wait until a supervisor, or a person, says that this worker is needed; ``tended``: see :class:`StandBy`."""
        told = StandBy()
        self.companion.tell(ready="spare")
        self.worker.set_state(WorkerStatus.SUSPENDED)
        name, log = self.worker.name, self.worker.log
        log.info("Worker %s: loaded; a spare, which claims once SIGUSR1 comes to pid %d", name, os.getpid())
        if told.wait(tended):
            log.info("Worker %s: no spare any more; it claims from now on", name)

    def loaded(self, fingerprints: list[str]) -> None:
        """Another task has been loaded, which may have set up logs of its own."""
        self.blocked.append(unblock())
        self.companion.tell(fingerprints=fingerprints, sources=self.sources.well())

    def could_not_load(self, task: str, error: BaseException) -> None:
        """So that an edit of what it consists of is seen."""
        self.companion.tell(sources=self.sources.failed(task, error))

    def tend(self) -> Guarded:
        """To be called in every round of the courier."""
        if self.scheduler is not None:
            self.scheduler.tend()
        return self.companion.tend()

    def stop(self, *, told: bool) -> None:
        """End all but the guardian. ``told``: the worker leaves because somebody said so."""
        if self.scheduler is not None:
            self.scheduler.stop()
        self.dependents.stop()
        if not told:
            self.notices.settled(LAST_PATIENCE)  # --max-jobs, --max-idle-time: who else would tell of the last one?
        self.notices.stop()


def schedule(worker: SimpleWorker, *, burst: bool, logging_level: str | None) -> SchedulerProcess | None:
    """RQ's scheduler for a worker's queues; as with RQ, a burst has due jobs moved once, before it begins."""
    names = worker.queue_names()
    if burst:
        move_due(worker.connection, names, worker.serializer)
        return None
    scheduler = SchedulerProcess(worker.connection, uuid.uuid4().hex, names, worker.serializer, logging_level)
    scheduler.start()
    return scheduler


def _device(settings: Settings) -> str:
    """What this worker computes on, and which devices of the host it has: a request remembers where it failed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{settings.device} [{visible}]" if visible and settings.device != "cpu" else settings.device
