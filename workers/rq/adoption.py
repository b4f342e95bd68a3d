"""Requests that come as plain RQ jobs: ``Queue.enqueue(task, n=3)`` with one of our tasks.

A stock producer knows nothing of requests. What it stores is a plain job that calls the task; the worker that
claims it makes a request of it before anything runs.
"""

from __future__ import annotations

from typing import Any

from rq.job import Job

from ...protocol.codec import pack
from ...protocol.errors import InvalidRequest
from ...protocol.settings import Settings
from ...protocol.tasks import is_task, path_of, prepared, resolve
from ..tasks.base import RAISED


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
