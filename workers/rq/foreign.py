"""Job and queue classes with a key prefix of their own (an attribute of RQ's classes): RQ's own code serves them.

Our scripts, and whoever else looks into a pool, know one prefix. So such a worker is RQ's own, with RQ's guarantees.
Where only the job class has a prefix, requests may come by its queue: it hands each on to a worker of ours, as a stock
worker does.
"""

from __future__ import annotations

from typing import Any

from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.queue import Queue
from rq.worker import BaseWorker, Worker


def foreign(worker: BaseWorker) -> str:
    """Why RQ's own code has to serve this worker's queues; empty if ours can."""
    kinds: list[Any] = [worker.job_class, worker.queue_class, *(type(queue) for queue in worker.queues)]
    kinds += [queue.job_class for queue in worker.queues]
    for kind in kinds:
        for name, usual in _PREFIXES.items():
            found = getattr(kind, name, usual)
            if found != usual:
                return f"{kind.__module__}.{kind.__qualname__} has a key prefix of its own, {found}"
    return ""


_PREFIXES = {
    "redis_job_namespace_prefix": Job.redis_job_namespace_prefix,
    "redis_queue_namespace_prefix": Queue.redis_queue_namespace_prefix,
}


def stock_worker(worker: BaseWorker) -> Worker:
    """RQ's worker in place of ours, for the same queues and with the same options."""
    job_class = _tolerant(worker.job_class)
    queues = [
        type(queue)(
            queue.name, connection=worker.connection, job_class=_tolerant(queue.job_class), serializer=worker.serializer
        )
        for queue in worker.queues
    ]
    stock = Worker(
        queues,
        name=worker.name,
        connection=worker.connection,
        job_class=job_class,
        queue_class=worker.queue_class,
        default_result_ttl=worker.default_result_ttl,
        exception_handlers=worker._exc_handlers or None,
        worker_ttl=worker.worker_ttl,
        maintenance_interval=worker.maintenance_interval,
        job_monitoring_interval=worker.job_monitoring_interval,
        log_job_description=worker.log_job_description,
        disable_default_exception_handler=worker.disable_default_exception_handler,
        serializer=worker.serializer,
    )
    stock.death_penalty_class = worker.death_penalty_class
    return stock


def _tolerant(kind: type[Job]) -> type[Job]:
    """The job class, of which ``fetch`` also finds what stands under RQ's usual prefix only: requests, say."""
    if kind.redis_job_namespace_prefix == Job.redis_job_namespace_prefix:
        return kind

    def fetch(cls: type[Job], id: str, connection: Any, serializer: Any = None) -> Job:
        try:
            found: Job = kind.fetch.__func__(  # type: ignore[attr-defined]
                cls, id, connection=connection, serializer=serializer
            )
            return found
        except NoSuchJobError:
            return Job.fetch(id, connection=connection, serializer=serializer)

    return type(kind.__name__, (kind,), {"fetch": classmethod(fetch), "__module__": kind.__module__})
