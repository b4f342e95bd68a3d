"""How many requests run at once after an out of memory, and which fit: decisions, by histories of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.workers.engine.batch_size import ENOUGH, QUIET, WINDOW, BatchSize
from perdure.workers.engine.room import Room, RoomVerdict

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ok", "ok", "full", "alone"]),
        st.sampled_from([0.0, 0.1, 1.0, QUIET / 2, QUIET, WINDOW, 1e6]),
        st.integers(min_value=2, max_value=40),
    ),
    max_size=60,
)


@given(st.integers(min_value=1, max_value=32), EVENTS)
@settings(max_examples=200, deadline=None)
def test_the_laws_of_the_limit(slots, events):
    """Between 1 and the slots; halved by every batch that was too large; it grows by one after a quiet
    time, or back.
    """
    size = BatchSize(slots)
    now, changed = 0.0, -QUIET
    before = slots
    alone: list[float] = []
    for event, seconds, number in events:
        now += seconds
        limit = size.limit
        if event == "ok":
            size.step_ok(now, min(number, slots))
            if size.limit > limit:
                quiet = now - changed >= QUIET
                assert (size.limit == limit + 1 and quiet) or (alone and size.limit <= before), "it grew without reason"
                assert size.limit <= slots
                changed = now
            assert size.limit >= limit
        elif event == "full":
            size.out_of_memory(now, number)
            assert size.limit == max(1, min(limit, number) // 2)
            before, changed = max(before, limit), now
        else:
            size.out_of_memory(now, 1)
            assert size.limit == limit, "one request says nothing about many"
            alone.append(now)
            changed = now
        assert 1 <= size.limit <= slots
        recent = alone[-ENOUGH:]
        assert size.exhausted == (len(recent) == ENOUGH and recent[-1] - recent[0] <= WINDOW)


def test_it_halves_and_grows_by_one():
    """8, 4, 2, 1, 1; then one more for each quiet time in which as many ran as were allowed."""
    size = BatchSize(8)
    limits = []
    for now in range(4):
        size.out_of_memory(now, 8)
        limits.append(size.limit)
    assert limits == [4, 2, 1, 1]
    size.step_ok(3 + QUIET - 1, 1)
    assert size.limit == 1
    size.step_ok(3 + QUIET, 1)
    size.step_ok(3 + QUIET, 2)
    assert size.limit == 2
    size.step_ok(1e6, 1)
    assert size.limit == 2, "fewer than allowed prove nothing"
    for times in range(1, 20):
        size.step_ok(1e6 + times * QUIET, 8)
    assert size.limit == 8


def test_one_large_request_does_not_slow_the_others():
    """Found alone, and the next step goes well without it: the limit is what it was before."""
    size = BatchSize(8)
    for number in (8, 4, 2, 1):
        size.out_of_memory(1.0, number)
    assert size.limit == 1
    size.step_ok(1.1, 1)
    assert size.limit == 8


def test_a_device_that_others_have_filled_stays_small():
    """Memory runs out for one after the other: no step went well in between, and the process is to be replaced."""
    size = BatchSize(4)
    for number in (4, 2, 1, 1):
        size.out_of_memory(0.0, number)
    assert (size.limit, size.exhausted) == (1, False)
    size.out_of_memory(WINDOW, 1)
    assert (size.limit, size.exhausted) == (1, True)


def test_single_requests_now_and_then_are_no_reason_to_leave():
    """Only within the window."""
    size = BatchSize(4)
    for times in range(10):
        size.out_of_memory(times * WINDOW, 1)
    assert not size.exhausted


BYTES = st.one_of(st.none(), st.integers(min_value=0, max_value=1000))


@given(st.lists(st.tuples(BYTES, BYTES, st.integers(min_value=0, max_value=5)), max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_request_is_admitted_only_into_what_is_free(events):
    """None waits for ever: where nobody else is, there is no waiting."""
    room = Room()
    for needed, free, admitted in events:
        verdict = room.judge(needed, free, admitted)
        if needed is None or free is None:
            assert verdict is RoomVerdict.ADMIT
            continue
        assert (verdict is RoomVerdict.ADMIT) == (needed <= free)
        assert verdict is not RoomVerdict.WAIT or admitted
        assert room.places(free, admitted, 0) >= admitted + 1
        assert room.places(free, admitted, 2) == admitted + 2


def test_what_never_fits_is_known_as_soon_as_it_comes():
    """By what was free when nobody was there; what that was is measured again each time."""
    room = Room()
    assert room.judge(10, 100, 0) is RoomVerdict.ADMIT
    assert room.judge(95, 90, 1) is RoomVerdict.WAIT
    assert room.judge(101, 90, 1) is RoomVerdict.NEVER
    assert room.judge(95, 94, 0) is RoomVerdict.NEVER
    assert room.judge(95, 90, 1) is RoomVerdict.NEVER


def test_as_many_are_claimed_as_there_is_room_for():
    """By the size of the newest; one at first, and one more where it is large: the next may be small."""
    room = Room()
    assert room.places(None, 0, 0) is None
    assert room.places(100, 0, 0) == 1
    room.judge(30, 100, 0)
    assert room.places(70, 1, 0) == 3
    room.judge(80, 70, 1)
    assert room.places(70, 1, 1) == 2
    assert room.places(70, 1, 0) == 2
