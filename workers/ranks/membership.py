"""When a group of ranks begins a new epoch, and when it gives up. Pure: events in, decisions out."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

ATTEMPTS: Final = 3
"""Losses after which a group still begins anew; the next one ends the process."""

QUIET: Final = 60.0
"""Seconds that an epoch must have lasted for the losses before it to be forgotten."""


class LossVerdict(Enum):
    """What follows from the loss of an epoch."""

    REBUILD = "rebuild"
    GIVE_UP = "give up"


@dataclass(slots=True)
class Membership:
    """The epochs of one group.

    1. :meth:`begin` gives the number of an epoch that is to be formed. No number is ever used twice, so that nothing
       which a process of an older one still writes can be met.
    2. :meth:`formed` says that all ranks are in it.
    3. :meth:`lost` says that a rank was lost, or that the epoch did not form, and answers what follows.

    An epoch without collectives is not lost by waiting: time counts only from :meth:`formed` to :meth:`lost`.
    """

    attempts: int = ATTEMPTS
    quiet: float = QUIET
    epoch: int = 0
    losses: int = 0
    _since: float | None = None

    def begin(self) -> int:
        """The number of the next epoch."""
        self.epoch += 1
        return self.epoch

    def formed(self, now: float) -> None:
        """All ranks are in the epoch; ``now`` in monotonic seconds."""
        self._since = now

    def lost(self, now: float) -> LossVerdict:
        """The epoch is over."""
        if self._since is not None and now - self._since >= self.quiet:
            self.losses = 0
        self._since = None
        self.losses += 1
        return LossVerdict.GIVE_UP if self.losses > self.attempts else LossVerdict.REBUILD


@dataclass(frozen=True, slots=True)
class RankReport:
    """How one rank came out of a step: the digest of what it put out, or what it raised.

    ``broken``: a collective failed in it, which says nothing about its cause.
    """

    digest: int = 0
    error: BaseException | None = None
    broken: str = ""


class RanksDisagree(Exception):
    """The ranks of a group put out different things in one step; the task is not the same on all of them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step of the group comes to.

    ``lost``: why the epoch is over; empty if it goes on. ``error``: what the step raises, at the cost of its
    requests; without one, and with ``lost``, the requests go on from their outputs.
    """

    lost: str = ""
    error: BaseException | None = None


def judge(leader: RankReport, followers: Mapping[int, RankReport | None], gone: Mapping[int, str]) -> Outcome:
    """Judge a step by the reports of all ranks; ``None`` for one that gave none in time, ``gone`` for how ranks ended.

    A rank's own error is evidence and fails the requests, as it does without a group. A rank that is gone, or silent,
    or in whose collective another one was missing, accuses nobody.
    """
    if gone:
        return Outcome("; ".join(f"rank {rank} {how}" for rank, how in sorted(gone.items())))
    reports = {0: leader, **followers}
    errors = {rank: report.error for rank, report in reports.items() if report is not None and report.error}
    if len(errors) == len(reports) and len({type(error) for error in errors.values()}) == 1:
        return Outcome(error=errors[0])  # all of them, at the same place: they are still in step
    if errors:
        rank, error = min(errors.items())
        return Outcome(f"rank {rank} alone raised {type(error).__name__}", error)
    silent = [rank for rank, report in followers.items() if report is None]
    if silent:
        return Outcome(f"{_ranks(silent)} did not answer in time")
    broken = {rank: report.broken for rank, report in reports.items() if report is not None and report.broken}
    if broken:
        rank, what = min(broken.items())
        return Outcome(f"a collective of rank {rank} failed: {what}")
    differing = [rank for rank, report in followers.items() if report is not None and report.digest != leader.digest]
    if differing:
        what = f"{_ranks(differing)} put out something else than rank 0 in the same step"
        hint = "a step must depend on nothing but load(), the requests and their order"
        return Outcome(what, RanksDisagree(f"{what}: {hint}"))
    return Outcome()


def ending(status: int) -> str:
    """How a process ended, in words, from its wait status as ``subprocess`` gives it."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)
