"""What scripts take and what they answer, as frozen records."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..packed_state import PackedState
from ..records import FailureKind, Interruption


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One request, or one plain RQ job, that a worker holds.

    ``created``: when it was submitted, in seconds since 1970, 0 if that cannot be read.
    ``seq`` and ``offset`` are those of the checkpoint to go on from; both 0 start from zero. ``step_timeout`` (seconds)
    is the request's own, if it has one.

    What people measure (not compared: a claim that is given again is the same one), in seconds at the moment of the
    claim: ``age`` since its submit, ``waited`` since it last came into its queue. ``interruption``: what became of the
    execution before; ``paused``: since something of that was last stored. ``trace``: the producer's, see
    :mod:`~perdure.protocol.telemetry.tracing`. ``heard``: somebody listened to its outputs at the claim. ``watched``:
    it has a deadline, a step timeout of its own, or company.
    """

    id: str
    execution: str
    queue: str
    plain: bool
    task: str
    payload: bytes
    attempt: int
    seq: int
    offset: int
    epoch: int
    fingerprint: str
    client: str
    timeout: float
    step_timeout: float | None = None
    created: float = 0.0
    age: float = field(default=0.0, compare=False)
    waited: float = field(default=0.0, compare=False)
    interruption: Interruption | None = field(default=None, compare=False)
    paused: float = field(default=0.0, compare=False)
    trace: str = ""
    heard: bool = field(default=False, compare=False)
    watched: bool = False


@dataclass(frozen=True, slots=True)
class Claims:
    """Answer of ``claim``: ``status`` is ok, blocked, more, suspended or reaped; ``degraded`` is the pool's mode.

    ``looks``: of the idle workers with its queues this one asks again in a second; the others wait to be rung.
    """

    status: str
    claims: list[Claim]
    degraded: bool = False
    looks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What one running request has to store: outputs ``offset … offset+outputs`` and perhaps a state.

    ``stepped``: seconds since the engine took it in, which is after a model was loaded for it. ``tell``: to whoever
    listens. ``brief``: this execution has stored something before, and its claim was not ``watched``. A state given as
    bytes is stored as they are. A field that ``progress.lua`` does not name stands in the checkpoint under its own
    name, from the first one of an execution on.
    """

    id: str
    execution: str
    seq: int
    offset: int
    outputs: int
    blob: bytes
    state: PackedState | bytes | None
    fingerprint: str
    stepped: float = 0.0
    tell: bool = False
    brief: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Chunk ``number`` (from 1) of ``total`` of the state that checkpoint ``seq`` will have."""

    id: str
    execution: str
    seq: int
    total: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one request: its last outputs and its result, packed; ``seconds`` it ran."""

    id: str
    execution: str
    offset: int
    outputs: int
    blob: bytes
    result: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The end of one execution without a result, with the policy for its kind."""

    id: str
    execution: str
    kind: FailureKind
    reason: str
    traceback: str
    charge: bool
    crash: bool
    loss: bool
    retry: bool
    batch: bool = False
    """It ended by an error of a step that others took part in: they are suspects, and nothing is counted."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Answer of ``heartbeat``: ``status`` is ok, reaped or newer."""

    status: str
    sweep_due: bool


@dataclass(frozen=True, slots=True)
class Reaped:
    """What ``reap`` took from the dead. ``outcome`` is queued, scheduled, failed, canceled, ended or gone."""

    incarnation: str
    worker: str
    id: str
    execution: str
    kind: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Answer of ``reap``: ``judged`` is False while the clocks say nothing; ``left`` asks for another call."""

    judged: bool
    left: bool
    reaped: list[Reaped]
