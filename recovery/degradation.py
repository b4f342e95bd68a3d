"""Degradation: a pool that has lost too many workers says so, and everybody asks less of it.

Live capacity (workers whose heart beats and that are ready) is compared with the expected one: ``PERDURE_CAPACITY``, or
the most workers that were there within the last hour. A worker that leaves in order (SIGTERM, ``--burst``) is expected
no longer, from the moment that it is told to; one that dies is, for an hour. Below half of it the pool is degraded, and
it is normal again once it has had more than 70 % for a heartbeat timeout.

:func:`judge` decides, from a count and from what the decision before has left. That lies in Redis, so that any number
of reapers decide as one: see ``declare.lua``. What follows from the mode is up to the scripts that read it: ``enqueue``
and ``claim``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Final

from ..protocol.reading.mode import Count, Mode, ModeTally
from ..protocol.settings import Settings
from ..protocol.transitions.sweeps import Sweeps

log = logging.getLogger("perdure.reaper")

ENTER: Final = 0.5
"""Below this part of the expected capacity a pool is degraded."""

LEAVE: Final = 0.7
"""Above this part it may be normal again. The gap keeps a pool near one of them from going to and fro."""

SPAN: Final = 600_000
SPANS: Final = 6
"""Ms, and how many of them, besides the current one, are remembered: the recent maximum is that of an hour."""

HOLD: Final = 10_000
"""Ms, besides two heartbeat timeouts, that a pool stays degraded when nobody decides any more."""


def judge(count: Count, *, capacity: int, timeout: int) -> ModeTally:
    """The mode that follows from a count. ``capacity`` workers are expected (0: the recent maximum).

    ``timeout``: the heartbeat timeout in ms. It is also how long a number of workers must last before it counts as a
    maximum: until then, a dead worker's last beat may be counted beside its successor. And it is the dwell: how long
    there must be enough workers before the pool is normal again.
    """
    now, tally = count.now, count.tally
    if tally.degraded and now >= tally.until:
        tally = replace(tally, degraded=False, since=now, recovering=0)  # nobody has said anything for a while
    if count.judged:
        tally = _decide(_remember(tally, count, capacity, timeout), now, timeout)
    return _hold(tally, now, timeout) if tally.degraded else replace(tally, until=0)


def _decide(tally: ModeTally, now: int, dwell: int) -> ModeTally:
    if not tally.degraded:
        if not tally.seen or tally.live >= ENTER * tally.expected:
            return tally
        return replace(tally, degraded=True, since=now, recovering=0, dwell=dwell)
    # Nothing is expected any more: all have left in order, or an hour ago.
    if tally.expected and tally.live <= LEAVE * tally.expected:
        return replace(tally, recovering=0)
    if not 0 < tally.recovering <= now:
        return replace(tally, recovering=now)
    if now - tally.recovering < dwell:
        return tally
    return replace(tally, degraded=False, since=now, recovering=0)


def _hold(tally: ModeTally, now: int, timeout: int) -> ModeTally:
    """Put off the moment at which it ends by itself; not at every count, or each would have to be written."""
    until = now + HOLD + 2 * timeout
    return replace(tally, until=until) if until - tally.until >= HOLD // 4 else tally


def _remember(tally: ModeTally, count: Count, capacity: int, timeout: int) -> ModeTally:
    """Enter a count, and what is expected by now."""
    now, live = count.now, count.live
    current = now // SPAN
    peaks = {span: number for span, number in tally.peaks if current - SPANS <= span <= current}
    lowest, since = min(tally.lowest, live), tally.lowest_since
    if not 0 < since <= now:
        lowest, since = live, now
    elif now - since >= timeout:
        peaks[current] = max(peaks.get(current, 0), lowest)
        lowest, since = live, now
    asked, asked_until = (tally.asked, tally.asked_until) if now < tally.asked_until else (0, 0)
    # Reapers that were told different numbers agree on the largest; one that was told none takes it from the others.
    if capacity > asked or (capacity == asked > 0 and asked_until - now <= HOLD // 2):
        asked, asked_until = capacity, now + HOLD
    return replace(
        tally,
        live=live,
        expected=asked or max(peaks.values(), default=0),
        seen=tally.seen or live > 0,
        lowest=lowest,
        lowest_since=since,
        asked=asked,
        asked_until=asked_until,
        peaks=tuple(sorted(peaks.items())),
    )


@dataclass(slots=True)
class Degradation:
    """One reaper's part in it: counts, decides, declares, and says so when the mode has changed."""

    store: Sweeps
    settings: Settings
    name: str

    def watch(self) -> None:
        """Decide once. Raises what redis-py raises."""
        count = self.store.weigh()
        timeout = max(1, round(self.settings.heartbeat_timeout * 1000))
        tally = judge(count, capacity=self.settings.capacity, timeout=timeout)
        if tally == count.tally or not self.store.declare(count, tally):
            return
        before = count.tally
        if tally.degraded and (not before.degraded or tally.since != before.since):
            log.warning("%s: %s; low priority is refused", self.name, _shown(tally))
        elif before.degraded and not tally.degraded:
            log.warning("%s: %s again", self.name, _shown(tally))


def _shown(tally: ModeTally) -> Mode:
    since = tally.since / 1000 if tally.degraded else None
    recovering = tally.degraded and tally.recovering > 0
    return Mode(degraded=tally.degraded, live=tally.live, expected=tally.expected, since=since, recovering=recovering)
