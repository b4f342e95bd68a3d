"""Taking requests in as far as there is memory, and what follows when there was not.

Two things bound how many requests are in an engine, below its slots: what its task says of bytes needed and free
(:mod:`.room`), and what out of memory has taught (:mod:`.batch_size`). A request for which there is no room waits
here, in its order, and the claimer is told to bring no more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...protocol.errors import InvalidRequest
from ...protocol.records import FailureKind
from ...protocol.telemetry import logs
from ...protocol.transitions.calls import Claim
from ...recovery.failures import classify
from ..leases.holdings import Holdings
from ..pool import statuses
from ..tasks.base import RAISED
from ..tasks.forks import foreign
from ..tasks.members import Members
from ..tasks.unfit import Unfit
from .device_memory import does_not_fit, empty_caches, forget, free_bytes
from .engines import Engine, WaitingRequest
from .fitness import Fitness
from .room import RoomVerdict


@dataclass(slots=True)
class Admissions:
    """Admits to engines, for the engine loop, in its thread."""

    holdings: Holdings
    fitness: Fitness
    log: logging.Logger
    before: Callable[[Engine, Claim], None] = lambda engine, claim: None
    """Called before the task's code for one request is."""

    def admit(self, engine: Engine) -> None:
        """Admit what waits, in its order, as far as there is room; then say how much more may come."""
        while engine.waiting and self._admit_next(engine, next(iter(engine.waiting.values()))):
            pass
        if behind := engine.overdue():
            self.holdings.put_back(behind, "this worker has no memory for it now; another may have")
        if not self.fitness.left:
            self.tell_room(engine)

    def ran_out(
        self, engine: Engine, concerned: Sequence[tuple[str, str]], size: int, error: BaseException, needed: int | None
    ) -> None:
        """The device's memory was not enough for ``size`` requests. Those concerned have left the engine.

        Where there were several, they go on from their checkpoints in a smaller batch. A single one has failed by
        itself, with the bytes that it ``needed``; others concerned were waiting behind it. To be called outside of
        the handler of the error.
        """
        forget(error)
        free = self._free_after_all(engine)
        engine.size.out_of_memory(time.monotonic(), size)
        engine.changed = True
        # Before anything is handed back: it comes again at once, as far as the limit allows.
        self.tell_room(engine)
        if size > 1:
            limit = engine.size.limit
            reason = f"out of device memory in a batch of {size}; this worker now runs at most {limit} at once"
            self.log.warning("%s: %s", engine.path, reason)
            self.holdings.put_back(concerned, reason)
        else:
            (alone, execution), *behind = concerned
            self.holdings.fail(alone, execution, does_not_fit(needed, free, error))
            self.holdings.put_back(behind, "out of device memory before its turn")
        if engine.size.exhausted:
            self.log.critical("single requests ran out of device memory again and again; leaving, to be replaced")
            self.fitness.leave(statuses.OUT_OF_MEMORY)

    def went_well(self, engine: Engine, size: int) -> None:
        """A step of so many requests had enough."""
        limit = engine.size.limit
        engine.size.step_ok(time.monotonic(), size)
        if engine.size.limit != limit:
            self.log.info("%s: up to %d requests at once again", engine.path, engine.size.limit)
            engine.changed = True

    def tell_room(self, engine: Engine) -> None:
        """Tell the claimer how many requests there is room for, where that may have changed."""
        if not engine.changed or self.fitness.device_error is not None:
            return
        limit = engine.size.limit
        self.holdings.capacity.limit("memory", limit if limit < engine.size.slots else None)
        try:
            with foreign:
                places = engine.places()
        except RAISED as error:
            self.log.exception("%s: cannot tell what memory is free", engine.path)
            self.fitness.judge(error)
            places = None
        self.holdings.capacity.limit("room", places)

    def _admit_next(self, engine: Engine, entry: WaitingRequest) -> bool:
        """Admit the request that has waited longest; False if nothing more is admitted now."""
        claim = entry.claim
        failed: BaseException | None = None
        needed: int | None = None
        verdict = RoomVerdict.ADMIT
        self.before(engine, claim)
        try:
            with foreign:
                engine.batch.check(entry.request.payload)
                try:
                    needed = engine.batch.memory_needed(entry.request.payload)
                except RAISED as error:
                    raise self._refusal(engine, entry, error) from None
                verdict = engine.judge(needed)
            if verdict is RoomVerdict.WAIT:
                return False
            if verdict is RoomVerdict.ADMIT:
                with logs.running(claim.id, claim.execution), foreign:
                    engine.batch.admit(entry.request)
        except RAISED as error:
            failed = error
        del engine.waiting[claim.id]
        engine.changed = True
        if failed is not None:
            self._fail(engine, claim, failed, needed)
        elif verdict is RoomVerdict.NEVER:
            too_large = does_not_fit(needed, engine.room.most)
            self.holdings.fail(claim.id, claim.execution, too_large, kind=FailureKind.GPU_OOM)
        else:
            engine.took(claim, needed)
            if isinstance(engine.batch, Members):
                engine.batch.limit(claim.id, claim.step_timeout)
            self.holdings.accept(claim, engine.fingerprint)
        return not self.fitness.left

    def _refusal(self, engine: Engine, entry: WaitingRequest, error: BaseException) -> BaseException:
        """Why a request is not admitted whose memory could not be told: it may be one that the task itself refuses."""
        if classify(error) is not FailureKind.ERROR or isinstance(error, Unfit):
            return error
        try:
            with logs.running(entry.claim.id, entry.claim.execution):
                engine.batch.admit(entry.request)
        except InvalidRequest as refusal:
            return refusal
        except RAISED:
            return error
        engine.batch.drop(entry.claim.id)
        return error

    def _fail(self, engine: Engine, claim: Claim, error: BaseException, needed: int | None) -> None:
        if classify(error) is FailureKind.GPU_OOM:
            concerned = [(claim.id, claim.execution), *engine.take_waiting()]
            self.ran_out(engine, concerned, len(engine.admitted) + 1, error, needed)
        else:
            if isinstance(error, Unfit):
                self.holdings.hand_back(claim, reason=f"its worker is unfit: {error}", delay=0.0)
            else:
                self.holdings.fail(claim.id, claim.execution, error)
            self.fitness.judge(error)

    def _free_after_all(self, engine: Engine) -> int | None:
        """Bytes free once everything was let go that can be; ``None`` if nobody can tell."""
        try:
            empty_caches()
            with foreign:
                free = engine.batch.memory_free()
            return free_bytes() if free is None else free
        except RAISED as error:
            self.log.exception("%s: cannot tell what memory is free", engine.path)
            self.fitness.judge(error)
            return None
