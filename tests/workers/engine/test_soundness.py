"""Whose fault it is when a step raises: what follows from who was in it, and from what went well since."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from perdure.workers.engine.soundness import BROKEN, REMEMBERED, Blame, Soundness


def test_several_are_suspects_and_one_alone_needs_a_proof() -> None:
    it = Soundness()
    assert it.raised(["a", "b"]) is Blame.ALL
    assert it.raised(["a"]) is Blame.UNKNOWN
    it.stepped(["b"])
    assert it.raised(["a"]) is Blame.REQUEST


def test_a_proof_is_of_another_request_and_counts_once() -> None:
    """What went well before the last raise says nothing of the engine after it."""
    it = Soundness()
    it.stepped(["a"])
    assert it.raised(["a"]) is Blame.UNKNOWN, "its own steps prove nothing"
    it.stepped(["b"])
    assert it.raised(["a"]) is Blame.REQUEST
    assert it.raised(["a"]) is Blame.EITHER, "a second time unproven"


def test_steps_before_a_raise_make_no_endless_loop() -> None:
    it = Soundness()
    found = []
    for _ in range(2):
        it.stepped(["a"])
        found.append(it.raised(["a"]))
    assert found == [Blame.UNKNOWN, Blame.EITHER]


@pytest.mark.parametrize("who", [["abc", "abc", "abc"], ["abcdef", "abc", "a", "a"], ["abcd", "ab"]])
def test_raises_with_one_in_common_accuse_no_engine(who: list[str]) -> None:
    it = Soundness()
    assert Blame.ENGINE not in [it.raised(list(names)) for names in who]


@pytest.mark.parametrize("who", [["a", "b", "c"], ["abcdefgh", "abcd", "efgh", "ab"], ["ab", "cd", "ab", "ef"]])
def test_raises_with_nobody_in_common_are_the_engines(who: list[str]) -> None:
    """As soon as three steps had nobody in common, each with each; a broken engine comes to that in halves too."""
    it = Soundness()
    found = [it.raised(list(names)) for names in who]
    assert BROKEN == 3
    assert (Blame.ENGINE in found) == (found[-1] is Blame.ENGINE) == (who != ["abcdefgh", "abcd", "efgh", "ab"])


@pytest.mark.parametrize("who", [["a", "b", "a"], ["ab", "a", "b", "a"], ["abcd", "ab", "cd", "a", "c", "c"]])
def test_two_that_raise_by_turns_are_to_blame(who: list[str]) -> None:
    """With nobody else there to prove it. The one that comes back alone tells by a fresh process."""
    it = Soundness()
    found = [it.raised(list(names)) for names in who]
    assert Blame.ENGINE not in found
    assert found[-1] is Blame.EITHER


def test_another_s_good_step_ends_the_succession() -> None:
    it = Soundness()
    it.raised(["a"])
    it.raised(["b"])
    it.stepped(["c"])
    assert it.raised(["d"]) is Blame.REQUEST


@pytest.mark.parametrize(("says", "blame"), [(True, Blame.REQUEST), (False, Blame.ENGINE), (None, Blame.UNKNOWN)])
def test_a_probe_decides_where_it_can(says: bool | None, blame: Blame) -> None:
    assert Soundness().raised(["a"], lambda: says) is blame


@pytest.mark.parametrize("who", ["abcdef", ["ab", "cd", "ef", "a", "c"]])
def test_what_the_probe_finds_sound_is_not_broken(who: Sequence[str]) -> None:
    """However many raise with nobody well beside them: each is charged as soon as it is alone."""
    it = Soundness()
    for names in who:
        assert it.raised(list(names), lambda: True) is (Blame.REQUEST if len(names) == 1 else Blame.ALL)


def test_it_does_not_grow() -> None:
    it = Soundness()
    for number in range(3 * REMEMBERED):
        it.stepped([f"other{number}"])
        it.raised([f"r{number}"])
        it.stepped([f"r{number}"])
        it.raised([f"r{number}"])
    assert len(it._unproven) <= REMEMBERED
    assert len(it._streak) < BROKEN + 1
