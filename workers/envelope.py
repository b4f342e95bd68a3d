"""What RQ's own worker finds in a request's envelope.

A request's ``data`` field is a call of :func:`wrong_worker` with the task's path. Our worker never
runs it; a stock one that was started on the same queue by mistake does, and gives the job back.
"""

from __future__ import annotations

import logging
import time

from rq import Retry

# RQ counts these in the job hash; a stock worker left running for years must not exhaust them.
PRACTICALLY_UNLIMITED = 1_000_000_000

# A stock worker takes the same job again at once; without a pause it would spin on it.
PAUSE_SECONDS = 1.0


def wrong_worker(task: str) -> Retry:
    """Give a request back to its queue, and say how the worker should have been started.

    Without an interval the retry goes straight back to the list: RQ's scheduled registry needs a
    scheduler, which may not run.
    """
    logging.getLogger("rq.worker").error(
        "the request for %s needs Perdure's worker; start this one with: rq worker -w perdure.workers.Worker QUEUE",
        task,
    )
    time.sleep(PAUSE_SECONDS)
    return Retry(max=PRACTICALLY_UNLIMITED)
