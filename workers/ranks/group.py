"""A worker that is a group of ranks: the leader's side.

The leader is the worker process itself. It claims, and it alone talks to Redis; what it puts out is what the group
puts out. It tells the followers over their sockets what changed and that a step begins, steps with
them, and waits for their reports. So all ranks admit, step and drop the same requests in the same order.

When a rank is lost, the epoch is over: collectives are aborted, what the step brought is forgotten, and the group
forms anew from those that are left and new processes in the place of those that are not. The requests then go on
from what they have put out, as they would on another worker. They are not charged: nobody knows whose fault it was.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import sys
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, Final

from ...protocol.errors import SettingsError, UnknownTask
from ...protocol.settings import Settings
from ...protocol.tasks import path_of
from ..tasks.base import NOTHING, RAISED, BatchTask, Request, Step
from ..tasks.collectives import CollectiveFailed, Collectives, serve
from ..tasks.forks import foreign
from ..tasks.unfit import Unfit
from .followers import LINGER, Followers
from .membership import LossVerdict, Membership, Outcome, RankReport, judge
from .rank import digest

log: Final = logging.getLogger("rq.worker")

TURN: Final = 0.2
"""Seconds that a turn of the engine loop may wait for the group to form: between two turns, leases are renewed."""

COLLECTIVE_TIMEOUT: Final = 30.0
"""Seconds that one collective may take, at most, unless the setting says otherwise."""


@dataclass(slots=True)
class Kept:
    """What is needed to admit a request again: itself, and what it has put out since."""

    request: Request
    outputs: list[Any] = field(default_factory=list)
    state: Any = NOTHING

    def again(self) -> Request:
        """The request as another execution would find it."""
        state = self.request.state if self.state is NOTHING else copy.deepcopy(self.state)
        return dataclasses.replace(self.request, outputs=[*self.request.outputs, *self.outputs], state=state)


class Group(BatchTask):
    """Runs a :class:`BatchTask` on ``ranks`` processes at once; to the engine loop it is one task like any other.

    While the group forms anew, :meth:`step` brings nothing and takes no longer than a fraction of a second.
    """

    def __init__(self, batch: BatchTask, settings: Settings | None = None) -> None:
        """``batch``: an instance of its own for this group.

        Raises :class:`~perdure.protocol.errors.UnknownTask` when no other process can import it, and
        :class:`~perdure.protocol.errors.SettingsError` for a timeout with which a lost rank would look like a hung
        worker.
        """
        if batch.ranks < 1:
            raise ValueError(f"ranks must be at least 1, not {batch.ranks}")
        settings = settings or Settings.from_environment()
        self.batch = batch
        self.step_timeout = batch.step_timeout
        self.reproducible = batch.reproducible
        self.membership = Membership()
        self.path = _path(batch)
        self.timeout = collective_timeout(settings, batch.step_timeout or settings.step_timeout)
        self.collectives = Collectives(0, batch.ranks, self.timeout)
        hello = {"task": self.path, "world": batch.ranks, "timeout": self.timeout, "path": sys.path}
        self.followers = Followers(hello, settings.environment(), self.collectives.interrupt)
        self._settings = settings
        self._store: Any = None
        self._fingerprint = ""
        self._kept: dict[str, Kept] = {}
        self._changes: list[tuple[str, Any]] = []
        """What the followers have not been told yet."""
        self._joined = False
        self._lost_at = 0.0
        self._finalizer = weakref.finalize(self, self.followers.close)

    @property
    def slots(self) -> int:  # type: ignore[override]
        """Those of the task."""
        return self.batch.slots

    # --- for the engine loop ---------------------------------------------------------------------------

    def load(self) -> None:
        """Start the followers, load on all ranks at once, and form the first epoch. Raises what any rank raises."""
        try:
            self._store = serve()
            for rank in range(1, self.batch.ranks):
                self.followers.start(rank)
            self.batch.group = self.collectives
            self.batch.load()
            self.followers.settled(self._settings.load_timeout)
            for rank, follower in self.followers.everyone.items():
                follower.raise_from(0)
                if not follower.ready:
                    how = (
                        follower.fate() if follower.gone else f"had not loaded after {self._settings.load_timeout:g} s"
                    )
                    raise ChildProcessError(f"rank {rank} {how}")
            self._form()
        except BaseException:
            self.close()
            raise
        self._fingerprint = self.batch.fingerprint()
        log.info("%s runs on %d ranks, followers: %s", self.path, self.batch.ranks, self.followers.pids())

    def fingerprint(self) -> str:
        """That of the task, and the number of ranks: sums over another number have other bits."""
        return hashlib.sha256(f"{self.batch.ranks} ranks {self._fingerprint}".encode()).hexdigest()

    def prepare(self, payload: Any) -> Any:
        return self.batch.prepare(payload)

    def check(self, payload: Any) -> None:
        self.batch.check(payload)

    def admit(self, request: Request) -> None:
        if self._joined:
            self.batch.admit(request)
            self._changes.append(("admit", request))
        self._kept[request.id] = Kept(request)

    def step(self) -> list[Step]:
        """One step of all ranks, or a turn of forming anew. Raises :class:`Unfit` when that was tried too often."""
        if not self._joined:
            return self._rebuild()
        changes, self._changes = self._changes, []
        whole = self.followers.step(changes)
        steps: list[Step] = []
        leader = RankReport()
        try:
            if whole:
                with foreign:
                    steps = list(self.batch.step())
                leader = RankReport(digest=digest(steps))
        except CollectiveFailed as error:
            leader = RankReport(broken=str(error))
        except RAISED as error:
            leader = RankReport(error=error)
        finally:
            self.followers.stepped()
        if self.collectives.broken:  # also if the task has caught it
            leader = RankReport(broken=self.collectives.broken)
        outcome = self._judged(leader)
        if outcome.lost:
            self._lose(outcome.lost)
        if outcome.error is not None:
            raise outcome.error
        if outcome.lost:
            return []
        self._keep(steps)
        return steps

    def drop(self, request_id: str) -> None:
        self._kept.pop(request_id, None)
        if self._joined:
            self.batch.drop(request_id)
            self._changes.append(("drop", request_id))

    def close(self) -> None:
        """End the followers."""
        self._joined = False
        self.collectives.abort()
        self._finalizer()
        self._finalizer = weakref.finalize(self, self.followers.close)

    # --- a step ----------------------------------------------------------------------------------------

    def _judged(self, leader: RankReport) -> Outcome:
        """All ranks' reports of a step, waited for, and what they come to."""
        well = not leader.error and not leader.broken
        if leader.broken:
            self.collectives.abort()  # lets go whoever waits for this rank
        reports, gone = self.followers.reports(self.timeout if well else LINGER)
        return judge(leader, reports, gone)

    def _keep(self, steps: list[Step]) -> None:
        for step in steps:
            kept = self._kept.get(step.request_id)
            if kept is None:
                continue
            if step.output is not NOTHING:
                kept.outputs.append(step.output)
            if step.state is not NOTHING:
                kept.state = copy.deepcopy(step.state)
            if step.ends:
                del self._kept[step.request_id]

    # --- epochs ----------------------------------------------------------------------------------------

    def _lose(self, why: str) -> None:
        """The epoch is over. Raises :class:`Unfit` if there were too many."""
        over = self.collectives.epoch
        if self._joined:
            for identifier in self._kept:
                self.batch.drop(identifier)
        self._joined = False
        self._lost_at = time.monotonic()
        self._changes.clear()
        self.collectives.abort()
        verdict = self.membership.lost(self._lost_at)
        log.warning(
            "%s: %s; epoch %d is over, %d request(s) go on from what they have put out (loss %d of %d)",
            self.path,
            why,
            over,
            len(self._kept),
            self.membership.losses,
            self.membership.attempts,
        )
        if verdict is LossVerdict.GIVE_UP:
            self.close()
            raise Unfit(f"the ranks of {self.path} were lost {self.membership.losses} times; the last time, {why}")
        self.followers.order_anew("abandon")

    def _rebuild(self) -> list[Step]:
        """A turn of forming the next epoch; what cannot be admitted to it ends with its error."""
        waited = time.monotonic() - self._lost_at
        for rank, follower in list(self.followers.everyone.items()):
            if follower.said(0, "raised"):
                follower.kill()
                self.followers.start(rank)
                self._lose(f"rank {rank} could not load")
                return []
            if not follower.gone:
                if not follower.fresh and not follower.ready and waited > LINGER:
                    follower.kill()  # it is stopped, or still sits in a collective
                continue
            if follower.fresh:
                self.followers.start(rank)
                self._lose(f"rank {rank} {follower.fate()} while it loaded")
                return []
            self.followers.start(rank)
        if not self.followers.settled(TURN):
            if waited > self._settings.load_timeout:
                self._lose(f"the group had not formed after {self._settings.load_timeout:g} s")
            return []
        if not all(item.ready for item in self.followers.everyone.values()):
            return []
        try:
            self._form()
        except (CollectiveFailed, ChildProcessError) as error:
            self._lose(str(error))
            return []
        except RAISED as error:
            self.close()
            raise Unfit(f"{self.path} cannot restart: {type(error).__name__}: {error}") from error
        if self.batch.fingerprint() != self._fingerprint:
            self.close()
            raise Unfit(f"{self.path} computes different bits in epoch {self.collectives.epoch} than in the one before")
        log.info(
            "%s: epoch %d, %.1f s after the loss; followers: %s",
            self.path,
            self.collectives.epoch,
            time.monotonic() - self._lost_at,
            self.followers.pids(),
        )
        return self._admit_again()

    def _form(self) -> None:
        """Bring all ranks, which are ready, into a new epoch. Raises what the task's ``meet`` raises here or elsewhere,
        :class:`CollectiveFailed`, or ``ChildProcessError`` for a rank that is gone or silent.
        """
        epoch = self.membership.begin()
        self.followers.order_anew("form", epoch, self._store.port)
        self.collectives.form(epoch, self._store)
        with foreign:
            self.batch.meet()
        number = self.followers.wait_answers(self.timeout)
        for rank, follower in self.followers.everyone.items():
            follower.raise_from(number)
            if not follower.said(number, "joined"):
                raise ChildProcessError(f"rank {rank} did not join epoch {epoch}")
        self._joined = True
        self.membership.formed(time.monotonic())

    def _admit_again(self) -> list[Step]:
        failed = []
        for identifier, kept in list(self._kept.items()):
            request = kept.again()
            try:
                self.batch.admit(request)
            except RAISED as error:
                del self._kept[identifier]
                failed.append(Step(request_id=identifier, error=error))
            else:
                self._changes.append(("admit", request))
        return failed


def collective_timeout(settings: Settings, step_timeout: float) -> float:
    """Seconds that one collective may take: the setting, else 30, but always less than a step may.

    Raises :class:`~perdure.protocol.errors.SettingsError` for a setting that is not less.
    """
    if not settings.collective_timeout:
        return min(COLLECTIVE_TIMEOUT, 0.75 * step_timeout)
    if settings.collective_timeout >= step_timeout:
        raise SettingsError(
            f"PERDURE_COLLECTIVE_TIMEOUT ({settings.collective_timeout:g}) must be less than the step timeout "
            f"({step_timeout:g}); with more, a worker that has lost a rank counts as hung before it can form "
            "its group again"
        )
    return settings.collective_timeout


def _path(batch: BatchTask) -> str:
    try:
        return path_of(batch)
    except UnknownTask:
        return path_of(type(batch))  # an instance that was made of its class for this worker
