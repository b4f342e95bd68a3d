"""Whatever happens in whatever order: nothing is lost, nothing ends twice, and only the holder writes.

A state machine drives the real scripts on a real server: pretended workers, producers and reapers, whose replies get
lost, whose calls arrive late, and any of whose calls may be sent again at any later time. After every step all
of Redis is compared with a model (``tests/kit/protocol/model.py``); at the end healthy workers finish what is left.
"""

from __future__ import annotations

import pytest
import redis

from perdure.protocol import scripts, store
from tests.kit.protocol.clock import Change, pretended_clock
from tests.kit.protocol.machine import drive


def test_nothing_is_lost_and_nothing_ends_twice(connection, monkeypatch):
    """P1 to P4, in some histories."""
    drive(connection, monkeypatch, examples=20, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whatever_happens_for_longer(connection, monkeypatch):
    """The same in more and longer ones."""
    drive(connection, monkeypatch, examples=40, steps=45)


MISTAKES: dict[str, dict[str, Change]] = {
    "anybody may finish": {"finish": ("if not owns(id, execution, job[1], job[11]) then", "if job[1] == '' then")},
    "a finish does not look at started_at": {
        "finish": ("if not owns(id, execution, job[1], job[11]) then", "if job[1] ~= execution or execution == '' then")
    },
    "a claim asks the lease": {
        "claim/runnable": (
            "local runs_now = job.execution and runs(id, job.execution, job.holder)",
            "local runs_now = redis.call('ZSCORE', KEY.leases .. queue, id)",
        )
    },
    "a lost claim is not given again": {"claim/given_again": ("if not known[id] then", "if false then")},
    "a gap is accepted": {
        "lib/checkpoint/store": (
            "  if offset > have then return nil, have end\n",
            "  if offset > have then have = offset end\n",
        )
    },
    "a repeat is appended": {
        "lib/checkpoint/store": ("  if outputs > 0 and offset + outputs > have then", "  if outputs > 0 then")
    },
    "a reaped request keeps its lease": {
        "lib/failure/decide": (
            "part(queue, id, execution, incarnation, worker)\n  if cancel_asked(",
            "if cancel_asked(",
        )
    },
    "nobody is preferred": {"claim/passed_over": ("if not failed_there(job.failed_on, here) then", "if true then")},
    "a retry is promoted and still waits": {
        "lib/queue/promote": ("    redis.call('ZREM', KEY.retries .. queue, id)\n", "")
    },
}


LONG_TO_FIND = {
    "a claim asks the lease",
    "a finish does not look at started_at",
    "a lost claim is not given again",
    "anybody may finish",
    "nobody is preferred",
}


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG_TO_FIND else []) for name in MISTAKES]
)
def test_a_planted_mistake_is_found(connection, monkeypatch, mistake):
    """The machine would see what it is there for."""
    with pretended_clock(MISTAKES[mistake]):
        for name in scripts.names():
            vars(store)["load"](name)  # what is changed must stand there, or anything else would count as found
    # A script that stops on what the mistake has left behind shows it as well.
    with pytest.raises((AssertionError, redis.ResponseError)):
        drive(connection, monkeypatch, examples=200, steps=30, planted=MISTAKES[mistake])
