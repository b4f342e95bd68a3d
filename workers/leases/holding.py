"""A holding: one request that this worker holds, and what of it Redis has not confirmed yet.

The engine loop adds to it, the courier takes from it; the courier's lock guards it. What was sent
and not answered stays as it is, because only a verbatim second sending is recognised as such.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from ...protocol.codec import pack, pack_entry, pack_result
from ...protocol.errors import PayloadTooLarge
from ...protocol.limits import LONGEST_DELAY, MAX_BYTES
from ...protocol.packed_state import CHUNK, PackedState, pack_state
from ...protocol.records import FailureKind
from ...protocol.settings import Settings
from ...protocol.transitions.calls import Claim, Failure, Finish, Progress
from ...recovery.failures import failure
from ..tasks.base import NOTHING, Step
from .hearing import Hearing

LARGE = CHUNK
"""Bytes of a state above which not every one is captured: copying it takes as long as a short step."""

MAX_BEHIND = 256 * 1024
"""Bytes of outputs that wait for the next captured state; with more, the next one is captured at once."""

MAX_CALL = MAX_BYTES
"""Bytes of outputs that one call carries, where more can be stored in several."""

MAX_TOGETHER = 32 * 1024 * 1024
"""Bytes of outputs that can be stored only together, with the state that follows them: they are one call."""

STUCK_BYTES, STUCK_SECONDS = 8 * 1024 * 1024, 2.0
"""When outputs have waited too long for a state that does not come."""


@dataclass(slots=True)
class Holding:
    """One held request.

    ``offset`` counts the outputs that are in Redis for certain, ``pending`` holds those that are
    not; ``size`` is how many bytes of them waits.

    A task that gives a large state at every step is not copied at every step: as long as the courier has not
    stored the one before, or no checkpoint is due, a state is passed over. What was put out with it or after it
    stays ``behind`` until a later state is captured, so that outputs are never stored without their state; the end
    of the request needs none.
    """

    claim: Claim
    offset: int
    seq: int
    fingerprint: str = ""
    moved: float = field(default_factory=time.monotonic)
    """When it last showed life by itself (monotonic seconds); see :meth:`Holdings.last_moved`."""
    pending: list[Any] = field(default_factory=list)
    size: int = 0
    state: PackedState | None = None
    sizes: list[int] = field(default_factory=list)
    """Bytes of each of ``pending``."""
    first: int = 0
    last: int = 0
    """With a state: ``pending[first:last]`` goes with it, since they were put out with it, or with one that it
    replaced. Before and behind, outputs may be stored in any number of calls.
    """
    sealed: int | None = None
    """From here on, outputs of ``pending`` can only go with the end of the request: their state was passed over."""
    flight: Progress | None = None
    flying: list[Any] = field(default_factory=list)
    """The outputs in ``flight``."""
    flying_sizes: list[int] = field(default_factory=list)
    sendings: int = 0
    """How often ``flight`` was sent without an answer: as long as it was not, it may be taken apart."""
    refused: int = 0
    """How many calls in succession Redis has not taken that stored or ended this, although it answered others."""
    quiet: float = 0.0
    """Until when it is left alone after such a call (monotonic seconds)."""
    behind: list[Any] = field(default_factory=list)
    behind_sizes: list[int] = field(default_factory=list)
    behind_size: int = 0
    behind_since: float | None = None
    """When the first state was passed over that no later one has made good; ``None`` if there is none."""
    eager: bool = False
    """Every state is captured: its task does not give one at every step."""
    weight: int = 0
    """Bytes of the last state that was captured."""
    captured: float = 0.0
    """When that was (monotonic seconds)."""
    streak: int = 0
    """How many steps in succession have brought a state."""
    ended: Finish | Failure | None = None
    result: Any = NOTHING
    canceling: bool = False
    stopping: bool = False
    """One of RQ's stop commands named it; Redis does not know yet."""
    began: float = field(default_factory=time.monotonic)
    accepted: float = 0.0
    """When the engine took it in (monotonic seconds); 0 before."""
    first_output: float = 0.0
    last_output: float = 0.0
    """When the engine put out the first and the last output of this execution (monotonic seconds)."""
    shown: bool = False
    """RQ's record of this execution is in Redis: its first checkpoint or renewal has put it there."""
    moving: bool = False
    """Something of this execution is in Redis."""
    hearing: Hearing = field(default_factory=Hearing)

    @classmethod
    def of(cls, claim: Claim) -> Holding:
        """The holding right after its claim."""
        holding = cls(claim=claim, offset=claim.offset, seq=claim.seq)
        if claim.heard:
            holding.hearing.listen()
        return holding

    @property
    def prompt(self) -> bool:
        """True while it has put something out for which somebody waits."""
        return bool(self.pending) and self.hearing.heard

    @property
    def key(self) -> tuple[str, str]:
        """Request id and execution, as renewals and releases want them."""
        return self.claim.id, self.claim.execution

    @property
    def leaving(self) -> bool:
        """True when nothing more will be computed for it here."""
        return self.ended is not None or self.result is not NOTHING or self.canceling

    @property
    def unsent(self) -> bool:
        """True while something that it has put out is not confirmed."""
        return bool(self.pending) or self.state is not None or self.flight is not None

    @property
    def finishing(self) -> bool:
        """True when only the finish is left to send."""
        return self.result is not NOTHING and self.flight is None and not self.splits

    @property
    def splits(self) -> bool:
        """True while more is to be sent than one call should carry, and it can be sent in several."""
        if self.size <= MAX_CALL:
            return False
        taken, with_state = self._cut()
        return taken < len(self.pending) and (taken > 0 or with_state)

    def add(self, step: Step, settings: Settings) -> None:
        """Take one step in.

        Raises ``UsageError`` for an output, state or result that cannot be stored, and what copying a state's
        tensors from their device raises.
        """
        size = 0 if step.output is NOTHING else len(pack(step.output, limit=settings.max_payload, what="output"))
        captured = False
        if step.state is NOTHING:
            self.streak = 0
        else:
            self.streak += 1
            if self.state is None and self.behind_since is None:
                self.first = len(self.pending)
            if self._passes_over(step, settings):
                self.behind_since = self.behind_since or time.monotonic()
            else:
                self.state = pack_state(step.state, limit=settings.max_state, compression=settings.compression)
                self.weight, self.captured = self.state.size, time.monotonic()
                self._catch_up()
                captured = True
        if step.output is not NOTHING:
            self.last_output = time.monotonic()
            self.first_output = self.first_output or self.last_output
            if self.behind_since is None:
                self.pending.append(step.output)
                self.sizes.append(size)
                self.size += size
            else:
                self.behind.append(step.output)
                self.behind_sizes.append(size)
                self.behind_size += size
        if captured:
            self.last = len(self.pending)
            self._refuse_too_much(settings)
        if step.error is not None:
            self.fail(step.error)
        elif step.result is not NOTHING:
            pack_result(step.result, limit=settings.max_payload)  # refuses here, where it is one request's fault
            self.result = step.result
            if self.behind and self.sealed is None:
                self.sealed = len(self.pending)
            self._catch_up()

    def _passes_over(self, step: Step, settings: Settings) -> bool:
        """Whether a step's state is not captured: it is large, and there will be another before it could be stored."""
        if self.eager or self.weight <= LARGE or self.streak < 3 or step.durable or self.behind_size > MAX_BEHIND:
            return False
        waits = self.state is not None or self.flight is not None
        return waits or time.monotonic() - self.captured < settings.checkpoint_interval

    def _catch_up(self) -> None:
        """What was behind may be stored."""
        self.pending += self.behind
        self.sizes += self.behind_sizes
        self.size += self.behind_size
        self._drop_behind()

    def _drop_behind(self) -> None:
        self.behind, self.behind_sizes, self.behind_size, self.behind_since = [], [], 0, None

    def _refuse_too_much(self, settings: Settings) -> None:
        together = sum(self.sizes[self.first : self.last])
        limit = max(MAX_TOGETHER, settings.max_payload)
        if together > limit:
            raise PayloadTooLarge(
                f"{self.last - self.first} outputs belong to one state, or came before it could be stored: "
                f"together they have {together:,} bytes, more than the {limit:,} that can be stored at once; "
                "yield less in a step"
            )

    def _cut(self) -> tuple[int, bool]:
        """How many of ``pending`` the next call takes, and whether the state goes with them."""
        most = len(self.pending) if self.sealed is None else self.sealed
        with_state = self.state is not None and not self.first
        if self.state is not None and self.first:
            most = min(most, self.first)
        take = self.last if with_state else min(1, most)
        total = sum(self.sizes[:take])
        while take < most and total + self.sizes[take] <= MAX_CALL:
            total += self.sizes[take]
            take += 1
        return take, with_state

    def stuck(self, step: Step) -> bool:
        """Whether outputs wait in vain after this step: its task has begun to give steps without a state.

        The state that was passed over is gone, since the task may have changed it.
        """
        if self.behind_since is None or step.state is not NOTHING or step.ends:
            return False
        waited = time.monotonic() - self.behind_since
        return step.durable or self.behind_size > STUCK_BYTES or waited > STUCK_SECONDS

    def fail(self, error: BaseException, kind: FailureKind | None = None, counted: str = "") -> None:
        """End this execution with a failure, of the error's kind or another; what it has put out is stored first.

        ``counted``: ``batch`` or ``crash`` (:class:`Failure`), if nobody knows yet that it is this request's own.
        """
        self.result = NOTHING
        self._drop_behind()  # a retry computes them again, from the state that is stored
        ended = failure(self.claim.id, self.claim.execution, error, kind)
        if counted:
            ended = replace(ended, charge=False, retry=True, crash=counted == "crash", batch=counted == "batch")
        self.ended = ended

    def cancel(self) -> None:
        """It was canceled: nothing of it is wanted any more."""
        self.canceling = True
        self.drop()

    def drop(self) -> None:
        """Nothing of what is not stored yet is to be stored."""
        self.flight, self.result, self.ended = None, NOTHING, None
        self._take(len(self.pending), with_state=True)
        self.flying, self.flying_sizes, self.sendings = [], [], 0
        self._drop_behind()

    def next_progress(self, *, due: bool = True) -> Progress | None:
        """What to send now: what was sent and not answered, or, if ``due``, what came since; ``None`` for nothing."""
        if self.flight is not None and not self.sendings and self.result is not NOTHING:
            together = sum(self.flying_sizes) + self.size
            if self.flight.state is not None and together <= MAX_CALL:
                # Its state waits to be written, and the request has ended: the finish takes the outputs along.
                self.pending, self.sizes = self.flying + self.pending, self.flying_sizes + self.sizes
                self.flight, self.flying, self.flying_sizes, self.size, self.sealed = None, [], [], together, 0
        if self.finishing:
            return None
        if due and self.flight is None and (self.pending or self.state is not None):
            self.seq += 1
            taken, with_state = self._cut() if self.splits else (len(self.pending), True)
            state, sizes = self.state if with_state else None, self.sizes[:taken]
            outputs = self._take(taken, with_state=with_state)
            self.flight = Progress(
                id=self.claim.id,
                execution=self.claim.execution,
                seq=self.seq,
                offset=self.offset,
                outputs=len(outputs),
                blob=self._blob(outputs),
                state=state,
                fingerprint=self.fingerprint,
                stepped=time.monotonic() - self.accepted if self.accepted else 0.0,
                tell=bool(outputs) and self.hearing.tell(),
                brief=self.moving and self.offset > 0 and not self.claim.watched,
            )
            self.flying, self.flying_sizes, self.sendings = outputs, sizes, 0
        return self.flight

    def confirm(self) -> None:
        """What was on its way is stored."""
        assert self.flight is not None
        self.offset += self.flight.outputs
        self.flight, self.flying, self.flying_sizes, self.sendings = None, [], [], 0

    def _take(self, number: int, *, with_state: bool) -> list[Any]:
        """Take so many of ``pending``, and perhaps the state."""
        taken, self.pending = self.pending[:number], self.pending[number:]
        self.size, self.sizes = self.size - sum(self.sizes[:number]), self.sizes[number:]
        self.first, self.last = max(0, self.first - number), max(0, self.last - number)
        if self.sealed is not None:
            self.sealed = max(0, self.sealed - number)
        if with_state:
            self.state, self.first, self.last = None, 0, 0
        return taken

    def next_finish(self, settings: Settings) -> Finish:
        """The finish with all outputs that are left; the same object when asked again."""
        if not isinstance(self.ended, Finish):
            assert self.flight is None
            self.ended = Finish(
                id=self.claim.id,
                execution=self.claim.execution,
                offset=self.offset,
                outputs=len(self.pending),
                blob=self._blob(self.pending),
                result=pack_result(self.result, limit=settings.max_payload),
                seconds=time.monotonic() - self.began,
            )
        return self.ended

    def _blob(self, outputs: list[Any]) -> bytes:
        return pack_entry(self.claim.epoch, self.offset, outputs) if outputs else b""


@dataclass(frozen=True, slots=True)
class Handback:
    """A request to be released: why, after how many seconds it may be claimed again, and the fingerprint of a
    checkpoint that could not be matched.
    """

    holding: Holding
    reason: str
    delay: float = 0.0
    fingerprint: str = ""
    unable: bool = False
    """Its task could not be loaded here."""
    longest: float = LONGEST_DELAY
    """Seconds to which a delay may grow when the request is released again and again."""
