"""Plain RQ jobs: run by RQ's own code, but for ``Queue.enqueue(task, n=3)`` with one of our tasks.

A stock producer knows nothing of requests. What it stores is a plain job that calls the task; the worker that
claims it makes a request of it before anything runs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
from rq.exceptions import NoSuchJobError
from rq.executions import Execution
from rq.job import Job
from rq.worker import SimpleWorker, WorkerStatus

from ...protocol.codec import pack
from ...protocol.errors import InvalidRequest
from ...protocol.settings import Settings
from ...protocol.store import Store
from ...protocol.tasks import is_task, path_of, prepared, resolve
from ...protocol.transitions.calls import Claim
from ..redis_io.courier import Courier
from ..tasks.base import RAISED


@dataclass(frozen=True, slots=True)
class PlainJobs:
    """What a worker does with the plain jobs that its courier claims."""

    worker: SimpleWorker
    courier: Courier

    def run(self, claim: Claim) -> None:
        """Run a plain job by RQ's own code; the claim has already written what RQ's preparation writes.

        One that calls a task becomes a request instead. Raises :class:`InvalidRequest` for one that cannot be.
        """
        worker = self.worker
        queue = worker.queue_class(
            claim.queue, connection=worker.connection, job_class=worker.job_class, serializer=worker.serializer
        )
        try:
            job = worker.job_class.fetch(claim.id, connection=worker.connection, serializer=worker.serializer)
        except (ValueError, KeyError, TypeError, AttributeError, NoSuchJobError) as error:
            raise InvalidRequest(f"cannot read job {claim.id}: {type(error).__name__}: {error}") from error
        if task := task_of(job):
            self._adopt(claim, job, task)
            return
        execution = Execution(claim.execution, claim.id, worker.connection, worker_name=worker.name)
        worker.executions[execution.id] = execution
        names = {"RQ_WORKER_ID": worker.name, "RQ_JOB_ID": job.id}
        os.environ.update(names)
        try:
            worker.perform_job(job, queue, execution)
        finally:
            for name in names:
                os.environ.pop(name, None)
            # What is shown of a worker never ends it; and its registration must not come back without its fields.
            with suppress(redis.RedisError):
                if worker.connection.exists(worker.key):
                    worker.set_state(WorkerStatus.IDLE)

    def _adopt(self, claim: Claim, job: Job, task: str) -> None:
        """``Queue.enqueue(task, ...)``: make a request of it, and put it back in front."""
        worker, courier = self.worker, self.courier
        settings = courier.holdings.settings
        payload = payload_of(job, task, settings)
        store = Store(worker.connection, settings)  # the courier's is the courier's
        left_out = "; ".join(left_out_of(job, worker.queue_class.DEFAULT_TIMEOUT))
        store.adopt(
            courier.incarnation, worker.name, claim.id, claim.execution, task=task, payload=payload, left_out=left_out
        )
        if left_out:
            worker.log.warning(
                "Worker %s: job %s was enqueued with what a request has not: %s", worker.name, claim.id, left_out
            )
        courier.claimer.claimed -= 1  # --max-jobs counts it when it is claimed as what it is
        worker.log.info("Worker %s: job %s calls the task %s and is a request now", worker.name, claim.id, task)


def task_of(job: Job) -> str | None:
    """The dotted path of the task that a plain job calls; ``None`` for any other function."""
    try:
        instance, name = job.instance, job.func_name
        if instance is not None:
            return path_of(instance) if name == "__call__" and is_task(instance) else None
        resolve(name or "")
    except RAISED:
        return None  # whatever is wrong with it, RQ's own code will say so
    return name


def payload_of(job: Job, task: str, settings: Settings) -> bytes:
    """What the job passes to its task, packed: its keywords, or its only argument.

    Raises :class:`InvalidRequest` for arguments that are no payload, or that the task refuses.
    """
    args, kwargs = job.args, job.kwargs
    if args and (kwargs or len(args) > 1):
        raise InvalidRequest("a task takes keywords, or one argument, which is its payload", "payload")
    payload: Any = args[0] if args else dict(kwargs)
    return pack(prepared(resolve(task), payload), limit=settings.max_payload, what="payload")


def left_out_of(job: Job, default_timeout: int) -> list[str]:
    """What a job asks for that its request will not do, and what does instead; for people.

    A ``job_timeout`` that equals RQ's default (in seconds) cannot be told from none.
    """
    found = []
    if job.repeats_left:
        found.append("repeat: a request runs once, so it is not repeated (use rq cron)")
    if job.timeout is not None and job.timeout not in (-1, default_timeout):
        found.append(
            f"job_timeout={job.timeout}: the task's step_timeout watches each step, a deadline the whole request"
        )
    if any(job.retry_intervals or ()):
        found.append("Retry(interval): a request's retries wait by PERDURE_RETRY_BASE and PERDURE_RETRY_CAP")
    return found
