"""What a batch does next, told by histories; and what it says about its speed."""

from __future__ import annotations

import itertools

from perdure.protocol.records import NewRequest
from perdure.scripts.batch.progress import facts, line
from perdure.scripts.batch.tally import Tally
from perdure.scripts.batch.window import LONGEST_PAUSE, MOST_LOSSES, Ticket, Window


def request(identifier: str) -> NewRequest:
    return NewRequest(
        id=identifier,
        nonce="",
        queue="gpu",
        task="a.b",
        payload=b"",
        max_retries=0,
        result_ttl=1,
        failure_ttl=1,
        description="",
    )


def window(size: int, lines: int) -> Window:
    """One that has taken so many lines: ``i0``, ``i1`` …"""
    made = Window(size)
    for number in range(lines):
        made.take(Ticket(number, 0, f"c{number}", "a.b", "", request(f"i{number}"), f"i{number}"))
    return made


def submit(made: Window, now: float, *answers: str) -> list[str]:
    """Answer what is due; the last answer holds for the rest. Returns the ids that were submitted."""
    due = made.due(now)
    given = itertools.chain(answers, itertools.repeat(answers[-1]))
    made.answered(list(zip(due, given, strict=False)), now)
    return [ticket.id for ticket in due]


def test_it_holds_no_more_than_its_size() -> None:
    made = window(5, 3)
    assert (len(made), made.room) == (3, 2)
    assert submit(made, 0, "accepted", "same", "already") == ["i0", "i1", "i2"]
    assert (len(made), made.room, list(made.running)) == (3, 2, ["i0", "i1", "i2"])
    assert all(ticket.request is None for ticket in made.running.values()), "payloads are not kept"
    made.ended("i1")
    assert (made.room, list(made.running)) == (3, ["i0", "i2"])


def test_what_does_not_fit_comes_again_in_order() -> None:
    """After a second; before that only in the place of what has ended."""
    made = window(10, 5)
    assert submit(made, 0, "accepted", "accepted", "full") == ["i0", "i1", "i2", "i3", "i4"]
    assert made.waiting_for == "full"
    assert (made.due(0.5), made.next(0.4)) == ([], 0.6)
    made.ended("i0")
    assert submit(made, 0.5, "accepted") == ["i2"], "one has ended, one more is tried"
    assert made.due(0.6) == []
    assert submit(made, 1.0, "accepted") == ["i3", "i4"]
    assert (made.waiting_for, made.next(1.0)) == ("", None)


def test_a_degraded_pool_is_asked_again_when_it_says() -> None:
    made = window(10, 1)
    submit(made, 0, "degraded 4000 1 4")
    assert (made.waiting_for, made.next(1.0)) == ("degraded", 3.0)
    submit(made, 4.0, "degraded 99999999 1 4")
    assert made.next(4.0) == LONGEST_PAUSE
    assert submit(made, 34.0, "accepted") == ["i0"]


def test_a_foreign_id_is_given_back_once() -> None:
    made = window(10, 2)
    due = made.due(0)
    (taken,) = made.answered(list(zip(due, ["conflict", "accepted"], strict=True)), 0)
    assert (taken.id, list(made.running), len(made)) == ("i0", ["i1"], 1)


def test_what_vanishes_is_submitted_again_but_not_for_ever() -> None:
    made = window(10, 1)
    for _ in range(MOST_LOSSES):
        assert submit(made, 0, "accepted") == ["i0"]
        assert made.lost("i0", request("i0"))
        assert made.running == {}
    submit(made, 0, "accepted")
    assert not made.lost("i0", request("i0"))
    assert made.ended("i0").losses == MOST_LOSSES + 1
    assert len(made) == 0


def test_one_call_has_at_most_as_many_as_the_protocol_takes() -> None:
    assert len(window(500, 300).due(0)) == 128


def test_speed_is_that_of_the_last_half_minute() -> None:
    """Lines of earlier runs are no speed, and an end that is not in sight is not guessed."""
    tally = Tally(lines=1000, kept=500)
    assert (tally.speed(), tally.left()) == ((0.0, 0.0), None)
    for second in range(100):
        tally.answered, tally.tokens = min(200, 10 * second), 50 * second
        tally.sample(float(second))
    assert tally.speed() == (0.0, 50.0), "for half a minute nothing has ended"
    assert tally.left() is None
    tally.answered = 300
    tally.sample(100.0)
    assert tally.left() == (1000 - 800) / (100 / 30)


def test_the_line_says_all() -> None:
    tally = Tally(lines=2000, kept=100, failed_before=1, answered=899, tokens=500, resumes=1, in_flight=64)
    assert line(tally) == "batch: 1,000 of 2,000 lines (50 %), 1 failed, 64 in flight, 0 tokens/s, 1 resume"
    tally.sample(0.0)
    tally.answered, tally.tokens = 909, 700
    tally.sample(10.0)
    assert facts(tally) == "1 failed, 64 in flight, 20 tokens/s, 1 resume, 0:16:30 left"
    tally.waiting_for = "redis"
    assert facts(tally).endswith(", Redis does not answer")
