"""The delays of retries: they double up to a cap, and requests that failed together come back one by one."""

from __future__ import annotations

import pytest

from tests.kit.protocol.backoff import backoff, schedule


def test_delays_double_up_to_their_cap() -> None:
    """base, 2 base, 4 base … cap, each less at most a quarter."""
    for delay, longest in zip(schedule("a", 7, 1.0, 30.0), (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert 0.75 * longest < delay <= longest
    assert 22.5 < backoff("a", 2_000, 1.0, 30.0) <= 30


@pytest.mark.slow
def test_retries_of_one_batch_come_back_apart() -> None:
    """The jitter spreads neighbours evenly over the quarter."""
    delays = sorted(backoff(f"request-{number}", 1, 1.0, 30.0) for number in range(400))
    for part in range(4):
        low = 0.75 + part / 16
        assert 60 <= sum(low < delay <= low + 1 / 16 for delay in delays) <= 140


def test_a_delay_stays_what_it_was() -> None:
    """These are what release 0.2.0 computed, in Python: the same request waits as long in every release."""
    assert [round(delay, 6) for delay in schedule("a", 3, 1.0, 30.0)] == [0.845348, 1.672189, 3.307361]
