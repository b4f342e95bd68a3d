"""What RQ's own worker finds in a request's envelope.

A request's ``data`` field is a call of :func:`wrong_worker` with the task's path. Our worker never
runs it; a stock one that was started on the same queue by mistake does, and hands the request on.
"""

from __future__ import annotations

import logging

from rq import Retry, get_current_job

from ..protocol.keys import key

# RQ counts these in the job hash; a stock worker left running for years must not exhaust them.
PRACTICALLY_UNLIMITED = 1_000_000_000

ASIDE = 3600
"""Seconds after which RQ's scheduler, where one runs, puts the request back should no worker of ours have taken it."""

NOTED = 7 * 86400
"""Seconds for which the set of noted requests lives."""


def wrong_worker(task: str) -> Retry:
    """Put a request where no stock worker looks, note it for ours, and say how the worker should have been started.

    An idle stock worker takes what is in its queue at once: back in the queue, the request would come to it again and
    again. So it goes to RQ's scheduled registry, and into a set of ours, which the next claim looks into first.
    """
    logging.getLogger("rq.worker").error(
        "the request for %s needs Perdure's worker; start this one with: rq worker -w perdure.workers.Worker QUEUE",
        task,
    )
    job = get_current_job()
    if job is not None:
        # Before RQ moves it: should this process die in between, a sweep finds it in RQ's started registry.
        with job.connection.pipeline() as pipe:
            pipe.sadd(key("bounced", job.origin), job.id)
            pipe.expire(key("bounced", job.origin), NOTED)
            pipe.zadd(key("aside"), {job.origin: 0}, lt=True)
            pipe.execute()
    return Retry(max=PRACTICALLY_UNLIMITED, interval=ASIDE)
