"""The client: puts requests in, and hands out handles to what becomes of them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import redis

from ..protocol.keys import check_id
from ..protocol.reading.mode import Mode
from ..protocol.settings import Settings
from ..protocol.store import Store
from ..protocol.telemetry import tracing
from .admission import Submission, submit_all, submit_one, through
from .arguments import flag, waited
from .handle import Handle
from .options import Options, Submit, SubmitMany, taking
from .reading.listing import Listing, Wanted, read_listing
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

    @taking(Submit)
    def submit(self, asked: Submit) -> Handle:
        """Store a request; once this returns, it will end exactly once.

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
        return through(self._submission(asked))

    @taking(SubmitMany)
    def submit_many(self, asked: SubmitMany) -> Handles:
        """Store many requests in few calls; handles come in the order of the items.

        All are checked before the first is stored. An option applies to all items that have none of their own. Raises
        as :meth:`submit` does; with ``IdempotencyConflict``, ``QueueFull`` or ``Degraded``, all but those it names were
        stored.
        """
        return through(self._submissions(asked))

    def _submission(self, asked: Submit) -> Submission[Handle]:
        retry = flag(asked.retry_when_degraded, "retry_when_degraded")
        request = build(asked.task, asked.payload, self.settings, asked)
        with tracing.sending([request]) as (traced,):
            yield from submit_one(self._session, traced, asked.idempotency_key, retry=retry)
        return Handle(request.id, self._session)

    def _submissions(self, asked: SubmitMany) -> Submission[Handles]:
        retry = flag(asked.retry_when_degraded, "retry_when_degraded")
        requests = build_many(asked.items, self.settings, Options.of(asked))
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
        """Raise :class:`RedisUnavailable` unless Redis answers now, ``ProtocolMismatch`` if its protocol is newer."""
        self._session.ping()

    def list(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        worker: str | None = None,
        kind: str | None = None,
        task: str | None = None,
        text: str | None = None,
        within: float | None = None,
    ) -> Listing:
        """One page of requests: running ones first, then waiting, then ended ones from the newest.

        They are narrowed down by ``status``, ``queue`` (with its priorities), ``worker`` (who has it, or had it last),
        ``kind`` (of its failure), ``task``, ``text`` (part of its id, task or reason of failure) and ``within``
        (seconds since its submit); ``cursor`` is that of the page before. A page looks at 1000 requests at most: it may
        be empty and have a cursor. No snapshot: what moves while you turn pages may be seen twice or not at all. Raises
        :class:`InvalidRequest` for what cannot be.
        """
        deadline = time.monotonic() + self._session.patience
        return read_listing(
            lambda operation: self._session.call(operation, deadline=deadline),
            status=status,
            queue=queue,
            limit=limit,
            cursor=cursor,
            wanted=Wanted(worker=worker, kind=kind, task=task, text=text, within=within),
        )

    def close(self) -> None:
        """End the listener and the connections; handles cannot be used any more. Harmless when repeated."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
