"""The model under a server whose clock is set back and ahead. It counts the true time.

Times that stand in Redis are not compared: how far they are off depends on when the clock was set. Instead, no
worker that was heard within its timeouts may lose anything, and nothing may vanish or be late.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perdure.protocol.keys import key
from tests.kit.protocol.model import QUEUES, Call, Expected, World


class SteppedWorld(World):
    """``now`` is the true time, which nothing sets."""

    off = 0.0
    """Seconds by which the server's clock is ahead of the true time; below 0 it is behind."""

    @property
    def now(self) -> int:
        return self.clock.now - round(self.off * 1000)

    def set_clock(self, seconds: float) -> None:
        """Set the server's clock: ahead, or back with a number below 0."""
        self.off += seconds
        self.clock.step(seconds)

    def cut(self) -> int:
        """No example lasts an hour: nothing is stale."""
        return -1

    def let_pass(self, seconds: float) -> None:
        """Under sweeps, as a reaper's; hours pass at once."""
        pace = 0.5 if seconds < 60 else seconds
        for _ in range(round(seconds / pace)):
            self.apply(Call("sweep"))
            self.store.promote(QUEUES, rounds=16)
            self.check()
            self.clock.advance(pace)
            self.check()

    def _sweep(self, call: Call) -> Any:
        silent = {name for name, deadline in self.beats.items() if deadline <= self.now}
        due = {item.id for item in self.living if item.execution and (item.lease <= self.now or item.holder in silent)}
        sweep = self.store.reap(QUEUES, kind="WORKER_LOST", reason="no heartbeat")
        taken = {row.id for row in sweep.reaped if row.id}
        assert taken <= due, f"{taken - due} were taken from workers that were not late"
        assert {row.incarnation for row in sweep.reaped if not row.id} <= silent, "who was heard was declared dead"
        self._taken(sweep.reaped, charge=False)
        return sweep

    def _expire(self, call: Call) -> int:
        for item in self.living:
            if item.ended and item.at is not None and self.now - item.at >= 3_600_000:
                item.drop_checkpoint()
        return self.store.expire(QUEUES)

    def _check_preference(self, item: Expected, incarnation: str) -> None:
        """By whom it is not to be taken for a while is a matter of times."""

    def _same_times(self, found: Mapping[str, float], expected: Mapping[str, float]) -> bool:
        return found.keys() >= expected.keys()

    def _check_beats(self) -> None:
        assert self.look.zset(key("beats")).keys() == self.beats.keys()
