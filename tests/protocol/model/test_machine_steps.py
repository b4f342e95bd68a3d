"""The property machine while the server's clock is set: nothing is lost, late or taken from the living."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.kit.protocol.machine import DELIVERY, INDEX, VERBS, Requests, drive
from tests.kit.protocol.stepped_model import SteppedWorld

STEPS = (-3600, 3600, -90_000, 60, -60, 5)
"""Seconds. Ahead, an hour once: of two such steps together a checkpoint would look older than it may become."""


class Stepped(Requests):
    """Seconds pass, not hours; nothing has a deadline, whose rule has tests of its own."""

    world_type = SteppedWorld
    world: SteppedWorld
    pauses = (0.5, 1, 1, 2, 6, 12)

    def __init__(self) -> None:
        super().__init__()
        self.steps = set(STEPS)

    @rule(
        verb=st.sampled_from([*VERBS, "set_clock", "set_clock"]), index=INDEX, which=INDEX, size=st.integers(0, 2),
        delivery=DELIVERY,
    )  # fmt: skip
    def step(self, verb, index, which, size, delivery):
        getattr(self, verb)(index, which, size, delivery)

    def set_clock(self, index: int, which: int, size: int, delivery: str) -> None:
        seconds = STEPS[index]
        if seconds in self.steps:
            self.steps.discard(seconds)
            self.world.set_clock(seconds)

    def tell(self, call, delivery="heard", agent=None):
        if call.verb == "enqueue":
            call = replace(call, rows=tuple(replace(row, deadline=0) for row in call.rows))
        return super().tell(call, delivery, agent)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_clock_that_is_set_loses_nothing_and_accuses_nobody(connection, monkeypatch):
    """Each history sets it back and ahead by a minute, an hour, a day, between any two calls."""
    drive(connection, monkeypatch, examples=40, steps=40, kind=Stepped)
