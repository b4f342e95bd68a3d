"""The ends of plain RQ jobs: RQ's own code writes them, and knows no fence.

A job may be enqueued again under its id while it runs (``job_id=``, ``enqueue_job``, rq-scheduler). RQ's end of the
first run would then save the first job, its function and its result, over the second one.
"""

from __future__ import annotations

from typing import Any

from rq.executions import Execution
from rq.job import Job
from rq.utils import utcformat
from rq.worker import SimpleWorker

from ..tasks.forks import end_if_forked


class PlainEnds(SimpleWorker):
    """RQ's handlers of an end, each of them only for the run that is still the job's own."""

    def _finalize_success(self, job: Job, queue: Any, execution: Execution, return_value: Any) -> None:
        """RQ's end of a job that has returned; a child that the job has forked ends here instead."""
        end_if_forked()
        super()._finalize_success(job, queue, execution, return_value)

    def _finalize_failure(self, job: Job, queue: Any, execution: Execution, exc_info: Any) -> None:
        """RQ's end of a job that has raised; a child that the job has forked ends here instead."""
        end_if_forked(exc_info[1])
        super()._finalize_failure(job, queue, execution, exc_info)

    def handle_job_success(self, job: Job, queue: Any, started_job_registry: Any, execution: Execution) -> None:
        if not self._replaced(job, execution):
            super().handle_job_success(job, queue, started_job_registry, execution)

    def handle_job_failure(
        self,
        job: Job,
        queue: Any,
        started_job_registry: Any = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        if not self._replaced(job, execution):
            super().handle_job_failure(job, queue, started_job_registry, exc_string, execution)

    def handle_job_retry(
        self, job: Job, queue: Any, retry: Any, started_job_registry: Any, execution: Execution
    ) -> None:
        if not self._replaced(job, execution):
            super().handle_job_retry(job, queue, retry, started_job_registry, execution)

    def _replaced(self, job: Job, execution: Execution | None) -> bool:
        """Whether the id is another job's, or another run's, by now; then only the traces of this run are removed.

        An enqueue between this look and RQ's transaction, less than a millisecond later, is not seen.
        """
        if execution is None:
            return False
        current, enqueued, there = self.connection.hmget(job.key, "execution", "enqueued_at", "created_at")
        if there is None:
            return False  # deleted, and nobody has the id: RQ ends it as it does
        mine = utcformat(job.enqueued_at).encode() if job.enqueued_at else b""
        if current == execution.id.encode() and (enqueued or b"") == mine:
            return False
        self.log.warning("Worker %s: job %s was enqueued again while it ran; this result is dropped", self.name, job.id)
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(job, pipeline, execution)
            pipeline.execute()
        return True
