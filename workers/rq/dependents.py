"""Jobs that wait for another one's end: RQ's ``depends_on``, and its rate limits.

The script that ends a request notes its id when jobs depend on it, or when it had a slot under a rate limit;
whichever worker sees the note enqueues who waits, by RQ's own code. So does the one that takes a plain job from the
dead. So it does not matter who ended the request, a worker, a reaper or somebody who canceled it, nor whether that
process lived on; and a request on which nothing depends costs no call.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.group import Group
from rq.job import Job, JobStatus
from rq.rate_limit import RateLimitRegistry
from rq.registry import ReadyJobRegistry
from rq.worker_registration import clean_worker_registry

from ...protocol.keys import key
from .notices import serializer_of
from .rounds import Rounds

INTERVAL = 1.0
"""Seconds between two looks at the notes."""

CLEANUP_INTERVAL = 60.0
"""Seconds between two looks for what was cut off halfway: the parts of RQ's maintenance that judge no execution."""

GROUPS_INTERVAL = 600
"""Seconds between two looks for groups whose jobs are all gone, in the whole pool; RQ's own number."""

PORTION = 100

WAITING = (JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.RATE_LIMITED, JobStatus.STARTED)


@dataclass(slots=True)
class Dependents:
    """Looks for ended requests that others wait for. Over a connection of its own, in a thread of its own.

    A burst has no time to wait for the thread: it calls :meth:`enqueue` and :meth:`clean` itself, before each claim.
    """

    connection: redis.Redis
    queues: Sequence[str]
    queue_class: type[Queue]
    job_class: type[Job]
    serializer: Any
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    rounds: Rounds = field(default_factory=Rounds)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _cleaned: float = -math.inf

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="dependents", daemon=True).start()

    def stop(self) -> None:
        """Look no more; what is left to do, other workers find as well."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            if not self.rounds.due():
                continue
            try:
                self.clean()
                self.enqueue()
            except redis.RedisError:
                self.connection.connection_pool.disconnect()  # an outage: the courier logs it
            except Exception as error:
                # RQ's code stumbles over names that are no UTF-8, say: the next round is to come all the same.
                self.log.error("cannot look after jobs that wait: %s: %s", type(error).__name__, error)

    def enqueue(self) -> None:
        """Enqueue what waits for requests that have ended. Harmless when others do the same. Raises ``RedisError``."""
        while noted := self._noted():
            for name in noted:
                try:
                    self._enqueue_after(name)
                except redis.RedisError:
                    raise
                except Exception:
                    self.log.exception("cannot enqueue the jobs that depend on %s; they stay deferred", name)
                self.connection.srem(key("parents"), name.encode(errors="surrogateescape"))
            if len(noted) < PORTION:
                break

    def _noted(self) -> list[str]:
        found: Any = self.connection.srandmember(key("parents"), PORTION)
        return [name.decode(errors="surrogateescape") for name in found]

    def _enqueue_after(self, name: str) -> None:
        try:
            task = self.connection.hget(key("job", name), "task")
            # RQ reads a job's meta with it at once.
            job = self.job_class.fetch(
                name, connection=self.connection, serializer=serializer_of(task, self.serializer)
            )
        except NoSuchJobError:
            return  # it was deleted, and so were those that waited for it, if that was wanted
        queue = self.queue_class(
            job.origin, connection=self.connection, job_class=self.job_class, serializer=self.serializer
        )
        if job.get_status(refresh=False) in WAITING:
            moved = {}  # a retry: nobody's turn has come but that of those who want its slot
        else:
            moved = queue.enqueue_dependents(job)
        if job.has_rate_limit:
            self._pass_slot_on(job)
        number = sum(len(names) for names in moved.values())
        if number:
            self.log.info("%d job(s) that depend on %s are enqueued", number, name)

    def _pass_slot_on(self, job: Job) -> None:
        """Give back the slot of a job that neither waits in its queue nor runs, and fill what is free."""
        assert job.rate_limit_concurrency is not None
        registry = RateLimitRegistry.from_job(job)
        # By the status at that moment: somebody may requeue the job right now.
        promoted = registry.release_stale_and_enqueue(job.id)
        promoted += registry.acquire_and_enqueue(job.rate_limit_concurrency)
        if promoted:
            self.log.info("%d job(s) under the rate limit %s are enqueued", len(promoted), registry.key)

    def clean(self) -> None:
        """RQ's maintenance of registries and groups, if it is due. Raises ``RedisError``."""
        if time.monotonic() - self._cleaned > CLEANUP_INTERVAL:
            self._cleaned = time.monotonic()
            self._clean()

    def _clean(self) -> None:
        for name in self.queues:
            ReadyJobRegistry(
                name, connection=self.connection, job_class=self.job_class, serializer=self.serializer
            ).cleanup()
            clean_worker_registry(
                self.queue_class(name, connection=self.connection, job_class=self.job_class, serializer=self.serializer)
            )
        for registry in RateLimitRegistry.all(self.connection):
            registry.cleanup()
        if Group.acquire_maintenance_lock(self.connection, GROUPS_INTERVAL - 1):
            Group.clean_registries(self.connection)
