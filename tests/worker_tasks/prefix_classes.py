"""Classes of a user's own with a key prefix, and a job that tells what it finds in its environment."""

from __future__ import annotations

import os

from rq.job import Job
from rq.queue import Queue


class PrefixJob(Job):
    redis_job_namespace_prefix = "custom:job:"


class PrefixQueue(Queue):
    redis_queue_namespace_prefix = "custom:queue:"


def names() -> list[str | None]:
    """A plain job: its id and its worker's name."""
    return [os.environ.get("RQ_JOB_ID"), os.environ.get("RQ_WORKER_ID")]
