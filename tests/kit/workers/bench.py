"""A worker's inner parts without its threads: rounds and turns are taken one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import redis

from perdure.protocol.codec import pack
from perdure.protocol.records import NewRequest, RequestRecord
from perdure.protocol.settings import Settings
from perdure.protocol.store import Store
from perdure.workers.engine import engines
from perdure.workers.engine.loop import EngineLoop
from perdure.workers.guardian.companion import Guarded
from perdure.workers.leases.holdings import Holdings
from perdure.workers.leases.mailbox import Mailbox, News
from perdure.workers.redis_io.claimer import Claimer, Limits
from perdure.workers.redis_io.courier import Courier
from perdure.workers.redis_io.line import Line
from perdure.workers.tasks.base import Step
from tests.kit.protocol.pool import TASK, Pool


class Bench:
    """A worker's inner parts; the test is its engine loop and its clock."""

    def __init__(self, connection: redis.Redis, limits: Limits | None = None) -> None:
        # Every round stores; nothing expires while a test thinks.
        self.settings = Settings(checkpoint_interval=1e-6)
        self.pool = Pool(Store(connection, self.settings))
        self.holdings = Holdings(self.settings, Mailbox())
        log = logging.getLogger("rq.worker")
        store = self.pool.store
        self.claimer = Claimer(store, self.holdings, "w1", lambda: ["gpu"], limits or Limits(), True, log)
        self.rejoined: list[str] = []
        line = Line(store, "w1", self.holdings)
        self.courier = Courier(line, self.claimer, tended=lambda: Guarded.WELL, rejoined=self.rejoined.append)

    def round(self) -> None:
        self.holdings.urgent = True  # nothing is waited for
        self.courier._round()

    def rounds(self) -> None:
        """As many as it takes until Redis has every large state: one writes chunks for a bounded time only."""
        self.round()
        while self.courier.checkpoints.uploads.busy:
            self.round()
        self.round()

    def claim(self) -> None:
        """Until it has asked: a round only waits for a moment."""
        assert self.claimer.claim(self.courier.incarnation)
        while self.claimer.bells.waiting:
            assert self.claimer.claim(self.courier.incarnation)

    def offer(self, identifier: str, *steps: Step) -> None:
        """What the loop does with the steps of one turn."""
        execution = self.holdings.held[identifier].claim.execution
        rows = [Step(step.output, step.state, identifier, step.result, step.error) for step in steps]
        assert self.holdings.offer(rows, {identifier: execution}) == []

    def letters(self) -> list[Any]:
        return list(self.holdings.mailbox.take(wait=False))


def refuse_plain(claim: Any) -> None:
    raise AssertionError(f"a plain job: {claim}")


class Turns(Bench):
    """A bench whose loop is a real one."""

    def __init__(self, connection: redis.Redis, task: Any) -> None:
        super().__init__(connection)
        self.loop = EngineLoop(self.holdings, self.settings, refuse_plain, lambda shown: None, find=lambda path: task)
        self.loop._engines.load(TASK)

    def submit_all(self, payloads: dict[str, Any], **options: Any) -> None:
        requests = [
            NewRequest(
                id=name,
                nonce=name,
                queue="gpu",
                task=TASK,
                payload=pack(payload, limit=10**6, what="payload"),
                max_retries=3,
                result_ttl=600,
                failure_ttl=600,
                description=name,
                **options,
            )
            for name, payload in payloads.items()
        ]
        assert self.pool.store.enqueue(requests) == ["accepted"] * len(requests)

    def record(self, name: str) -> RequestRecord:
        record = self.pool.store.fetch(name)
        assert record is not None
        return record

    def turn(self, times: int = 1) -> None:
        """A round of the courier, and a turn of the loop."""
        for _ in range(times):
            self.holdings.wanting = True  # no bell is waited for, and no letter
            self.round()
            self.holdings.mailbox.put(News())
            self.loop.turn()

    def until(self, what: Callable[[], Any], most: int = 2000) -> Any:
        for _ in range(most):
            if found := what():
                return found
            self.turn()
        raise AssertionError("it did not come")

    def run(self, *names: str) -> None:
        """Until these have ended."""
        self.until(lambda: all(self.record(name).ended for name in names))

    @property
    def engine(self) -> engines.Engine:
        return self.loop._engines.loaded[TASK]

    def reasons(self, name: str) -> list[tuple[str, str]]:
        return [(event.event, event.reason) for event in self.pool.store.history(name)]
