"""Renewals: the leases of all that has moved are renewed, also of requests that put nothing out."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ...protocol.settings import LEASE
from .line import Line

QUESTION_INTERVAL = 0.5
"""Seconds between two questions about requests whose step takes long."""


@dataclass(slots=True)
class Renewals:
    """For the courier's thread."""

    line: Line
    _last: float = 0.0
    _last_question: float = 0.0

    def hasten(self) -> None:
        """The next renewal is due at once."""
        self._last = 0.0

    def adopt_lease(self) -> None:
        """Leases are as long as the task's step timeout asks; those given with another length are renewed at once."""
        with self.line.holdings.lock:
            holdings = self.line.holdings
            settings = holdings.capacity.task_settings(holdings.task)
            if settings.lease != self.line.store.settings.lease:
                self.line.store.settings = settings
                self.hasten()

    def renew(self) -> None:
        """Renew now and then the leases of all that has moved, also of requests that put nothing out."""
        line, holdings, now = self.line, self.line.holdings, time.monotonic()
        with holdings.lock:
            holdings.tell_stored()
            rows = [item for item in holdings.held.values() if not item.claim.plain]
            loading = now < holdings.loading_until
            interval = LEASE * min(holdings.step_timeouts()) / 10
            keys = [item.key for item in rows if loading or holdings.last_moved(item) > self._last]
            # What has put out nothing yet: RQ's tools are to see it all the same.
            late = now - holdings.settings.checkpoint_interval
            unseen = [item for item in rows if not item.shown and item.began <= late and not item.leaving]
            slow = [item.key for item in rows if item.claim.id in (holdings.apart or ())]
        if keys and now - self._last >= interval:
            line.ask(keys, lambda part: line.store.renew(line.incarnation, part))
            line.ledger.renewed(len(keys))
            # Not before: what was not renewed in an outage is renewed after it, moved or not.
            self._last = now
        elif unseen:
            line.ask([item.key for item in unseen], lambda part: line.store.renew(line.incarnation, part))
        for item in unseen:
            item.shown = True
        if slow and now - self._last_question >= min(QUESTION_INTERVAL, interval):
            # A step that takes long, or hangs, sends nothing; its cancellation or loss is heard all the same.
            line.ask(slow, line.store.standing)
            self._last_question = now
