"""Who is taken for hung: readings of two counters and a clock in, a verdict out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from perdure.workers.guardian.watchdog import GAP, LOOK, Counter, CounterReading, Page, Watch

STEP, COURIER = 2.0, 5.0


class History:
    """Looks at a worker every tenth of a second, as its guardian does."""

    def __init__(self) -> None:
        self.watch, self.now = Watch(), 100.0
        self.loop, self.courier = Counter(), Counter()
        self.loop.tick(STEP)
        self.courier.tick(COURIER)

    def look(self, after: float = LOOK) -> str:
        self.now += after
        return self.watch.look(self.now, self.loop.read(), self.courier.read())

    def pass_by(self, seconds: float, moving: Iterable[Counter] = ()) -> str:
        """The first verdict within so many seconds in which only these move."""
        for _ in range(round(seconds / LOOK)):
            for counter in moving:
                counter.tick(counter.read().allowed)
            if verdict := self.look():
                return verdict
        return ""


def test_who_moves_is_well() -> None:
    """For ever."""
    history = History()
    assert history.pass_by(60, [history.loop, history.courier]) == ""


@pytest.mark.parametrize(("name", "allowed"), [("engine loop", STEP), ("courier", COURIER)])
def test_who_stands_still_is_found(name: str, allowed: float) -> None:
    """After what is allowed, and a margin that ends before the lease does; not before."""
    history = History()
    other = [history.courier if name == "engine loop" else history.loop]
    assert history.pass_by(allowed, other) == ""
    assert f"its {name} has not moved" in history.pass_by(allowed / 4 + 2 * LOOK, other)
    assert history.now - 100 < 1.5 * allowed


def test_a_long_margin_is_half_a_second() -> None:
    """However long a step may take."""
    history = History()
    history.loop.tick(20)
    assert history.pass_by(20.4, [history.courier]) == ""
    assert history.pass_by(0.4, [history.courier]) != ""


def test_the_courier_may_be_silent_while_a_step_may_last() -> None:
    """A step, or a load, that holds the interpreter's lock silences all threads."""
    history = History()
    history.loop.tick(600)
    assert history.pass_by(590) == ""
    assert "engine loop" in history.pass_by(20)


def test_nobody_is_judged_without_a_word_of_the_loop() -> None:
    """A plain job runs, or the worker starts or leaves; the next tick begins anew."""
    history = History()
    history.loop.tick(0)
    assert history.pass_by(100) == ""
    history.loop.tick(STEP)
    assert history.pass_by(STEP, [history.courier]) == ""
    assert history.pass_by(1, [history.courier]) != ""


def test_a_courier_that_has_ended_is_not_judged() -> None:
    """Its last tick allows nothing."""
    history = History()
    history.courier.tick(0)
    assert history.pass_by(60, [history.loop]) == ""


@pytest.mark.parametrize("gap", [1.0, 4.0, GAP + 1, 3600.0])
def test_time_in_which_the_guardian_was_stopped_does_not_count(gap: float) -> None:
    """It was frozen along, or the machine was: the step goes on where it was."""
    history = History()
    assert history.pass_by(STEP / 2, [history.courier]) == ""
    assert history.look(gap) == ""
    assert history.pass_by(STEP / 2 - 3 * LOOK, [history.courier]) == ""
    assert "engine loop" in history.pass_by(STEP + 1, [history.courier])


def test_after_a_long_gap_there_is_another_whole_period() -> None:
    """What was frozen for long takes its time to come back."""
    history = History()
    history.pass_by(STEP, [history.courier])
    history.look(GAP + 1)
    assert history.watch.stopped_at == history.now
    assert history.pass_by(STEP, [history.courier]) == ""


def test_a_worker_that_hangs_is_found_on_a_slow_machine_too() -> None:
    """Looks that come late count for less, but they count."""
    history = History()
    looks = 0
    while not history.look(1.0):
        looks += 1
        assert looks < 100


def test_another_process_reads_what_was_ticked() -> None:
    """Through the descriptor that a guardian inherits."""
    page = Page.create()
    there = Page(page.fd, writable=False)
    page.loop.tick(20)
    page.courier.tick(0.0001)
    page.courier.tick(0.0001)
    assert (there.loop.read(), there.courier.read()) == (CounterReading(1, 20), CounterReading(2, 0.001))
    with pytest.raises(TypeError):
        there.loop.tick(1)
