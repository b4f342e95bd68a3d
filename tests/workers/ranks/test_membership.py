"""The decisions of a group: when it begins anew, when it gives up, and what a step of all ranks comes to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.pool.statuses import UNFIT
from perdure.workers.ranks.group import collective_timeout
from perdure.workers.ranks.membership import LossVerdict, Membership, RankReport, RanksDisagree, ending, judge
from perdure.workers.ranks.rank import digest
from perdure.workers.ranks.wire import Wire
from perdure.workers.tasks.base import Step
from perdure.workers.tasks.unfit import Unfit

OK = RankReport(digest=7)
MINE, THEIRS = ZeroDivisionError("mine"), MemoryError("theirs")


@pytest.mark.parametrize(
    ("history", "verdicts"),
    [
        # (seconds that an epoch lasted, or None if it never formed)
        ([1, 1, 1], "rrr"),
        ([1, 1, 1, 1], "rrrg"),
        ([None, None, None, None], "rrrg"),
        ([60, 60, 60, 60, 60], "rrrrr"),
        ([1, 1, 1, 60, 1, 1, 1], "rrrrrrg"),
        ([1, None, 59, 59], "rrrg"),
        ([1, 1, 1, None], "rrrg"),
    ],
)
def test_a_group_begins_anew_a_bounded_number_of_times(history, verdicts):
    """Losses count until an epoch has lasted; no epoch's number is used twice."""
    membership, now, found, epochs = Membership(), 100.0, "", []
    for lasted in history:
        epochs.append(membership.begin())
        if lasted is not None:
            membership.formed(now)
            now += lasted
        found += "r" if membership.lost(now) is LossVerdict.REBUILD else "g"
    assert found == verdicts
    assert epochs == list(range(1, len(history) + 1))


@pytest.mark.parametrize(
    ("leader", "followers", "gone", "lost", "error"),
    [
        pytest.param(OK, {1: OK}, {}, "", None, id="all well"),
        pytest.param(RankReport(error=MINE), {1: RankReport(error=MINE)}, {}, "", MINE, id="all raise: in step"),
        pytest.param(RankReport(error=MINE), {1: RankReport(error=THEIRS)}, {}, "rank 0 alone", MINE, id="two errors"),
        pytest.param(RankReport(error=MINE), {1: None}, {}, "rank 0 alone", MINE, id="the leader alone raises"),
        pytest.param(
            RankReport(broken="x"), {1: RankReport(error=THEIRS)}, {}, "rank 1 alone", THEIRS, id="one raises"
        ),
        pytest.param(RankReport(broken="x"), {1: None}, {1: "died"}, "rank 1 died", None, id="killed in a collective"),
        pytest.param(OK, {1: None}, {1: "died"}, "rank 1 died", None, id="killed after the last collective"),
        pytest.param(
            RankReport(error=MINE), {1: None}, {1: "died"}, "rank 1 died", None, id="killed, whatever it led to"
        ),
        pytest.param(RankReport(broken="x"), {1: None}, {}, "rank 1 did not answer", None, id="stopped"),
        pytest.param(OK, {1: None, 2: None}, {}, "ranks 1, 2 did not", None, id="two are stopped"),
        pytest.param(
            RankReport(broken="x"), {1: OK}, {}, "collective of rank 0 failed: x", None, id="a broken connection"
        ),
    ],
)
def test_a_step_is_judged_by_the_reports_of_all_ranks(leader, followers, gone, lost, error):
    """A rank's own error fails requests; one that is gone or silent ends the epoch and accuses nobody."""
    outcome = judge(leader, followers, gone)
    assert bool(outcome.lost) == bool(lost)
    assert lost in outcome.lost
    assert outcome.error is error


def test_ranks_that_disagree_fail_the_step():
    """What they computed is neither's, and would be no other the next time."""
    outcome = judge(OK, {1: OK, 2: RankReport(digest=8)}, {})
    assert "rank 2 put out something else" in outcome.lost
    assert isinstance(outcome.error, RanksDisagree)


def test_the_digest_of_a_step_tells_what_counts():
    """Outputs, results, whose they are and kinds of error; not the text of an error, nor what cannot be packed."""
    step = Step(request_id="a", output={"token": 1, "p": 0.5})
    assert digest([step]) == digest([Step(request_id="a", output={"token": 1, "p": 0.5})])
    others = [
        [], [step, step], [Step(request_id="b", output=step.output)],
        [Step(request_id="a", output={"token": 2, "p": 0.5})],
        [Step(request_id="a", output=step.output, result=None)], [Step(request_id="a", error=ValueError("1"))],
        [Step(request_id="a", error=TypeError("1"))],
    ]  # fmt: skip
    values = [digest(steps) for steps in [[step], *others]]
    assert len(set(values)) == len(values)
    assert digest([Step(request_id="a", error=ValueError("1"))]) == digest(
        [Step(request_id="a", error=ValueError("2"))]
    )
    assert digest([Step(request_id="a", output=object())]) == digest([Step(request_id="a", output=object())])


def test_a_collective_is_given_less_time_than_a_step():
    """Else a worker whose rank is stopped would count as hung before it can help itself."""
    assert collective_timeout(Settings(), 20.0) == 15.0
    assert collective_timeout(Settings(), 300.0) == 30.0
    assert collective_timeout(Settings(collective_timeout=60.0), 300.0) == 60.0
    with pytest.raises(SettingsError, match="PERDURE_COLLECTIVE_TIMEOUT"):
        collective_timeout(Settings(collective_timeout=20.0), 20.0)


def test_ends_are_told_in_words():
    assert ending(-signal.SIGKILL) == "was ended by SIGKILL"
    assert ending(3) == "ended with status 3"
    assert "250" in ending(-250)
    assert Unfit("x").status == UNFIT


def test_a_message_that_nobody_reads_does_not_hold_the_leader():
    """A rank that is stopped reads nothing; the socket is full, and the send fails."""
    ours, theirs = socket.socketpair()
    with theirs:
        wire = Wire(ours, timeout=0.1)
        with pytest.raises(OSError):
            wire.send(b"x" * 50_000_000)
        wire.close()


def test_messages_are_whole_and_end_with_the_other_process():
    """In any size; then the end of the other side is told."""
    ours, theirs = socket.socketpair()
    left, right = Wire(ours, 5.0), Wire(theirs, 5.0)
    messages: list[Any] = [None, ("step", 1, []), {"x": b"y" * 3000}]
    for message in messages:
        left.send(message)
        assert right.receive() == message
    left.close()
    with pytest.raises(EOFError):
        right.receive()
    right.close()


def test_a_follower_ends_with_its_leader_at_once():
    """The end of the socket is enough; it needs no torch for that."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "perdure.workers.ranks.rank", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=dict(os.environ),
        )  # fmt: skip
    ours.close()
    assert process.wait(60) == 0
