"""What a worker is told over pub/sub: RQ's commands, and that somebody listens to one of its requests."""

from __future__ import annotations

from typing import Any

import redis
from rq.command import parse_payload

from ...protocol.keys import key
from ..redis_io.courier import Courier
from .plain_ends import PlainEnds


class CommandedWorker(PlainEnds):
    """Everything here runs in RQ's pub/sub thread. Only the courier talks to Redis about requests."""

    def __init__(self, queues: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(queues, *args, **kwargs)
        self._courier: Courier | None = None

    def subscribe(self) -> None:
        """As RQ's own, and to a channel of ours: producers may not write to RQ's, on which workers are shut down."""
        self.log.info("Worker %s: subscribing to channel %s", self.name, self.pubsub_channel_name)
        worker: Any = self  # RQ does not say of which types these are
        worker.pubsub = worker.connection.pubsub()
        ours = key("replies", self.name)
        worker.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload, ours: self._listened})
        worker.pubsub_thread = worker.pubsub.run_in_thread(
            sleep_time=60, daemon=True, exception_handler=self._pubsub_exception_handler
        )

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """RQ's thread goes on after a lost connection, and would end when another takes too long."""
        if isinstance(exc, redis.TimeoutError | OSError):
            exc = redis.ConnectionError(str(exc))
        super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)

    def _listened(self, message: Any) -> None:
        """Somebody listens to a request from now on (:meth:`~...protocol.store.Store.listen`)."""
        if self._courier is not None:
            self._courier.holdings.listen(message["data"].decode(errors="replace"))

    def handle_payload(self, message: Any) -> None:
        """RQ's commands; the courier talks to Redis about those that name requests."""
        try:
            payload = parse_payload(message)
            words = [payload["command"], payload.get("job_id", ""), payload.get("execution_id", "")]
            if not all(isinstance(word, str) for word in words):
                raise TypeError("RQ's thread would end of what it cannot look up")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.log.warning("Worker %s: ignored a message that is no command of RQ's", self.name)
            return
        command, name, execution = words
        if command in ("stop-job", "stop-execution") and self._courier is not None:
            if self._courier.holdings.stop_request(name, execution):
                self.log.info("Worker %s: asked to stop request %s", self.name, name)
                return
            # RQ's own answer: should the job fail, it counts as stopped.
            self.log.warning("Worker %s: cannot interrupt a plain job; if it runs %s, that goes on", self.name, name)
        super().handle_payload(message)  # type: ignore[no-untyped-call]
