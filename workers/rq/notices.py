"""Who is told of an end: RQ's webhooks and callbacks, where RQ's own code did not run to the end.

That is every request that was made of a job (``Queue.enqueue(task, on_failure=…)``), and every plain job whose
worker was lost. The script that ends it leaves a note; a worker that sees the note acts upon it. So it does not
matter who ended the job, a worker, a reaper or somebody who stopped it.

At least once: a worker that is lost in the middle leaves the note, and another one acts upon it again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from rq.callbacks import execute_failure_callback, execute_stopped_callback, execute_success_callback
from rq.exceptions import AbandonedJobError, NoSuchJobError
from rq.job import Job
from rq.job_lifecycle import call_exception_handlers
from rq.results import Result
from rq.timeouts import TimerDeathPenalty

from ...protocol.codec import RestrictedPickle
from ...protocol.errors import RequestFailed
from ...protocol.keys import key
from .rounds import Rounds

INTERVAL = 1.0
"""Seconds between two looks at the notes."""

PORTION = 100

ALONE = 300
"""Seconds for which one worker has a note to itself: more than callback and webhooks may take together by default."""

PATIENCE = 0.5
"""Seconds for which the courier waits: it must not stand still for long."""

LAST_PATIENCE = 5.0
"""Seconds for which a worker waits that leaves by itself, after its last job."""


@dataclass(slots=True)
class Notices:
    """Acts upon notes, in a thread of its own and over a connection of its own: a webhook may take its time."""

    connection: redis.Redis
    job_class: type[Job]
    serializer: Any
    handlers: Sequence[Callable[..., Any]] = ()
    """RQ's exception handlers, called as RQ's clean-up of abandoned jobs calls them."""

    log: logging.Logger = field(default_factory=lambda: logging.getLogger("rq.worker"))
    rounds: Rounds = field(default_factory=Rounds)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _asked: bool = False
    _started: bool = False
    _stopped: bool = False
    _look: int = 0
    _quiet: int = 0
    """The number of the last look that found nothing to do."""

    def start(self) -> None:
        """Look from now on."""
        self._started = True
        threading.Thread(target=self._run, name="notices", daemon=True).start()

    def stop(self) -> None:
        """Look no more; what is left to do, other workers do."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def settled(self, patience: float = PATIENCE) -> bool:
        """True if a look that began after this call found nothing to do. Waits ``patience`` seconds for it.

        Before :meth:`start` nothing is waited for: a worker that could not load its tasks leaves at once.
        """
        if not self._started:
            return True
        with self._changed:
            wanted = self._look + 1
            self._asked = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._quiet >= wanted or self._stopped, patience)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._stopped, INTERVAL)
                if self._stopped:
                    return
                if not self._asked and not self.rounds.due():
                    continue
                self._asked = False
                self._look += 1
            try:
                done = self.tell()
            except redis.RedisError:
                self.connection.connection_pool.disconnect()  # an outage: the courier logs it
                continue
            with self._changed:
                if done == 0:
                    self._quiet = self._look
                self._asked = self._asked or done == PORTION
                self._changed.notify_all()

    def tell(self) -> int:
        """Act upon notes that nobody else acts upon; returns how many. Raises ``RedisError``."""
        found: Any = self.connection.srandmember(key("notices"), PORTION)
        done = 0
        for raw in found:
            note = raw.decode(errors="replace")
            if note.encode() != raw or note.count(":") < 2:
                self.log.warning("dropped a note of an end that no script of ours has written")
                self.connection.srem(key("notices"), raw)
                continue
            mark = key("notice", note)
            if not self.connection.set(mark, 1, nx=True, ex=ALONE):
                continue  # another worker does
            if self.connection.sismember(key("notices"), note):  # and has not just done so
                execution, verdict, name = note.split(":", 2)
                self._tell(name, execution, verdict)
                self.connection.srem(key("notices"), note)
                done += 1
            self.connection.delete(mark)
        return done

    def _tell(self, name: str, execution: str, verdict: str) -> None:
        try:
            task: Any = self.connection.hget(key("job", name), "task")
            # RQ reads a job's meta with it at once.
            job = self.job_class.fetch(
                name, connection=self.connection, serializer=serializer_of(task, self.serializer)
            )
            if task:
                job.func_name = task.decode()  # not the envelope's, which nobody has asked for
            self._call(job, execution, verdict, request=bool(task))
        except NoSuchJobError:
            self.log.warning("job %s (%s) was deleted before its webhooks and callbacks were called", name, verdict)
        except redis.RedisError:
            raise
        except Exception:
            self.log.exception("a callback of job %s (%s) failed", name, verdict)

    def _call(self, job: Job, execution: str, verdict: str, *, request: bool) -> None:
        # A request's result is a plain pickle, whatever the worker's serializer.
        result = _result_of(job, execution, serializer_of(request, self.serializer))
        try:
            if verdict == "finished":
                execute_success_callback(job, TimerDeathPenalty, result.return_value if result else None)
            elif verdict == "stopped":
                execute_stopped_callback(job, TimerDeathPenalty)
            elif verdict in ("failed", "retried"):
                error = _error_of(job, self.connection) if request else AbandonedJobError()
                execute_failure_callback(job, TimerDeathPenalty, type(error), error, None)
        finally:
            if verdict in ("failed", "retried") and not request:
                call_exception_handlers(self.handlers, job, AbandonedJobError, AbandonedJobError(), None)
            if verdict in ("finished", "failed"):
                job.send_webhooks(verdict, exc_string=(result.exc_string if result else None) or "")


def serializer_of(task: object, serializer: Any) -> Any:
    """What RQ's code may read a job with: of a request (it has a task), only plain values."""
    return RestrictedPickle if task else serializer


def _result_of(job: Job, execution: str, serializer: Any) -> Result | None:
    """What the execution left in RQ's result stream."""
    results = Result.all(job, serializer=serializer)
    return next((item for item in results if item.execution_id == execution), results[0] if results else None)


def _error_of(job: Job, connection: redis.Redis) -> RequestFailed:
    raw: Any = connection.hmget(key("job", job.id), "error_kind", "error_reason")
    kind, reason = ((value or b"").decode(errors="replace") for value in raw)
    return RequestFailed(job.id, kind, reason)
