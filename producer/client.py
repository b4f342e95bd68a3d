"""The client: puts requests in, and hands out handles to what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import redis

from ..protocol import tracing
from ..protocol.keys import Priority, check_id
from ..protocol.mode import Mode
from ..protocol.settings import Settings
from ..protocol.store import Store
from ..protocol.tasks import TaskLike
from .admission import Submission, submit_all, submit_one, through
from .arguments import Seconds, flag, waited
from .handle import Handle
from .listing import Listing, read_listing
from .session import PATIENCE, Session
from .submission import build, build_many

Handles = list[Handle]


class Client:
    """A producer's connection to the pool. One is enough for a process; any number of threads may use it.

    1. ``Client()``: finds Redis by the settings. Nothing is connected until it is needed.
    2. :meth:`submit`, :meth:`get`: hand out handles, whose waiting shares one listener.
    3. :meth:`close`, or the end of the ``with`` block.

    Whatever it sends can be sent twice, so it rides out an outage of Redis.

    Args:
        url: where Redis is; without one, ``PERDURE_REDIS_URL``, ``RQ_REDIS_URL`` or a running embedded server.
        settings: instead of those from the environment.
        connection: a redis-py client of your own, with replies as bytes; it stays open.
        patience: seconds for which each call outlasts an outage before it raises ``RedisUnavailable``, and for which a
            submit with ``retry_when_degraded`` waits for a degraded pool.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        connection: redis.Redis | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._session = Session(url, settings, connection, waited(patience, "patience"))

    @classmethod
    def from_url(cls, url: str, *, settings: Settings | None = None, patience: float = PATIENCE) -> Self:
        """A client for ``redis://``, ``rediss://`` or ``unix://``."""
        return cls(url, settings=settings, patience=patience)

    @property
    def settings(self) -> Settings:
        """The settings that this client works with."""
        return self._session.settings

    def submit(
        self,
        task: TaskLike | str,
        payload: Any,
        *,
        queue: str = "default",
        priority: Priority = "normal",
        id: str | None = None,
        idempotency_key: str | None = None,
        delay: Seconds = 0,
        deadline: Seconds | datetime | None = None,
        queue_timeout: Seconds | None = None,
        durable: bool = False,
        meta: Mapping[str, Any] | None = None,
        step_timeout: Seconds | None = None,
        degraded: Mapping[str, Any] | None = None,
        max_retries: int | None = None,
        result_ttl: Seconds | None = None,
        failure_ttl: Seconds | None = None,
        retry_when_degraded: bool = False,
    ) -> Handle:
        """Store a request; once this returns, it will end exactly once.

        Args:
            task: a task, or its dotted path, which is not imported.
            payload: None, bool, 64-bit int, float, str, bytes, list and dict.
            queue: a worker that serves it must be running sooner or later; none is needed now.
            priority: ``high`` and ``low`` wait in queues of their own, ``<queue>-high`` and ``<queue>-low``. A worker
                for ``<queue>`` takes from the three strictly in that order: while there is always something of a
                higher priority, nothing of a lower one runs. So that this does not starve, keep ``high`` rare, or
                run some workers with the order turned round (``rq worker … gpu-low gpu``). A degraded pool refuses ``low``.
            id: a name of your own, ``[A-Za-z0-9_-]``. Each can be used once.
            idempotency_key: any text instead of an id. Submitted again with the same task and payload, while the
                first request is kept, it gives a handle of that one, whatever has become of it and whatever the
                other options say. Keys are those of the whole pool, not of a queue.
            delay: seconds until it may enter its queue; its status is ``scheduled`` until then.
            deadline: seconds from now, or a date with a time zone, by which it must have ended. Later it is ended as
                failed, kind ``DEADLINE``, and ``result()`` raises ``DeadlineExceeded``: waiting within a second,
                running when its worker next writes. Where no worker and no reaper runs, whoever waits for it ends it
                while it waits, and gets ``TimeoutError`` some seconds later while it runs. It is not retried; an answer
                that comes first wins. Seconds count twice at the submit to a degraded pool.
            queue_timeout: seconds that it may wait in its queue until a worker first takes it; otherwise as above.
            durable: return only once the request is on disk (``WAITAOF``; about a second with Redis' default
                ``appendfsync everysec``).
            meta: a dict for people and tools; ``Job.fetch(id).meta`` shows it, tasks do not see it.
            step_timeout: longest time in seconds between two signs of life of this request while it runs, the steps of
                those that share its worker included; instead of the task's and of ``PERDURE_STEP_TIMEOUT``. After one
                and a half times as long it counts as hung and goes on elsewhere.
            degraded: fields that replace those of the payload, if the pool is degraded (has lost too many workers)
                when the request begins: ``{"max_tokens": 50}``, say. What began so goes on so.
            max_retries: retries after failures of the request's own; losses of workers are not counted.
            result_ttl: seconds to keep a finished request, its outputs and result.
            failure_ttl: seconds to keep a failed or canceled one.
            retry_when_degraded: if a degraded pool refuses it, try again until it is taken, for as long as the client's
                patience, and only then raise ``Degraded``.

        Raises:
            InvalidRequest: a field is wrong; nothing was stored.
            UnknownTask: this is no task, or no worker could import it.
            PayloadTooLarge: more than ``PERDURE_MAX_PAYLOAD`` bytes.
            IdempotencyConflict: another request has the id, or the key was used with another task or payload.
            Degraded: the pool has lost more than half of its workers, and the priority is low; nothing was stored.
            QueueFull: as many requests wait in the queue as ``PERDURE_QUEUE_LIMIT`` allows; nothing was stored.
            DurabilityUnavailable: ``durable``, and Redis cannot confirm it. The request is stored all the same.
            RedisUnavailable: no answer for as long as the client's patience. The request may have been stored.
        """
        return through(self._submission(
            task, payload, queue=queue, priority=priority, id=id,
            idempotency_key=idempotency_key, delay=delay, deadline=deadline,
            queue_timeout=queue_timeout, durable=durable, meta=meta, step_timeout=step_timeout, degraded=degraded,
            max_retries=max_retries, result_ttl=result_ttl, failure_ttl=failure_ttl,
            retry_when_degraded=retry_when_degraded,
        ))  # fmt: skip

    def submit_many(
        self,
        items: Iterable[Any],
        *,
        queue: str = "default",
        priority: Priority = "normal",
        delay: Seconds = 0,
        deadline: Seconds | datetime | None = None,
        queue_timeout: Seconds | None = None,
        durable: bool = False,
        meta: Mapping[str, Any] | None = None,
        step_timeout: Seconds | None = None,
        degraded: Mapping[str, Any] | None = None,
        max_retries: int | None = None,
        result_ttl: Seconds | None = None,
        failure_ttl: Seconds | None = None,
        retry_when_degraded: bool = False,
    ) -> Handles:
        """Store many requests in few calls; handles come in the order of the items.

        An item is ``(task, payload)``, or a dict with ``task``, ``payload`` and any option of :meth:`submit`.
        All are checked before the first is stored. Raises as :meth:`submit` does; with
        ``IdempotencyConflict``, ``QueueFull`` or ``Degraded``, all but those it names were stored.
        """
        return through(self._submissions(
            items, queue=queue, priority=priority, delay=delay, deadline=deadline, queue_timeout=queue_timeout,
            durable=durable, meta=meta, step_timeout=step_timeout, degraded=degraded, max_retries=max_retries,
            result_ttl=result_ttl, failure_ttl=failure_ttl, retry_when_degraded=retry_when_degraded,
        ))  # fmt: skip

    def _submission(
        self, task: TaskLike | str, payload: Any, *, retry_when_degraded: bool = False, **options: Any
    ) -> Submission[Handle]:
        retry = flag(retry_when_degraded, "retry_when_degraded")
        request = build(task, payload, self.settings, **options)
        with tracing.sending([request]) as (traced,):
            yield from submit_one(self._session, traced, options.get("idempotency_key"), retry=retry)
        return Handle(request.id, self._session)

    def _submissions(
        self, items: Iterable[Any], *, retry_when_degraded: bool = False, **common: Any
    ) -> Submission[Handles]:
        retry = flag(retry_when_degraded, "retry_when_degraded")
        requests = build_many(items, self.settings, common)
        with tracing.sending(requests) as traced:
            yield from submit_all(self._session, traced, retry=retry)
        return [Handle(request.id, self._session) for request in requests]

    def get(self, id: str) -> Handle:
        """The handle of a request, whoever submitted it. Asks nobody: an unknown id shows when it is used."""
        return Handle(check_id(id), self._session)

    def mode(self) -> Mode:
        """Whether the pool is degraded, and how many of its workers live."""
        return self._session.call(Store.mode)

    def ping(self) -> None:
        """Raise :class:`RedisUnavailable` unless Redis answers now, ``ProtocolMismatch`` if it speaks a newer protocol."""
        self._session.ping()

    def list(
        self, *, status: str | None = None, queue: str | None = None, limit: int = 50, cursor: str | None = None,
        worker: str | None = None, kind: str | None = None,
    ) -> Listing:  # fmt: skip
        """One page of requests: running ones first, then waiting, then ended ones from the newest.

        ``status``, ``queue`` (with its priorities), ``worker`` (who has it, or had it last) and ``kind`` (of its failure)
        narrow it down; ``cursor`` is that of the page before. No snapshot: what moves
        while you turn pages may be seen twice or not at all. Raises :class:`InvalidRequest` for what cannot be.
        """
        deadline = time.monotonic() + self._session.patience
        return read_listing(
            lambda operation: self._session.call(operation, deadline=deadline),
            status=status, queue=queue, limit=limit, cursor=cursor, worker=worker, kind=kind,
        )  # fmt: skip

    def close(self) -> None:
        """End the listener and the connections; handles cannot be used any more. Harmless when repeated."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
