"""The ledger: what a worker tells of its executions, in figures for the whole pool and in spans of a trace.

The courier enters what has happened; once per heartbeat the figures go to Redis. Nothing here decides anything, and
nothing of it is missed if the worker is killed but the figures of its last heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...protocol.packed_state import PackedState
from ...protocol.store import Store
from ...protocol.telemetry.measures import Meter
from ...protocol.telemetry.tracing import lost, processed
from ...protocol.transitions.calls import Claim, Finish, Progress
from ..leases.holding import Holding


@dataclass(slots=True)
class Measurements:
    """For the courier's thread. ``interval``: seconds between two calls; ``worker``: its name."""

    interval: float
    worker: str = ""
    meter: Meter = field(default_factory=Meter)
    _sent: float = field(default_factory=time.monotonic)

    def claimed(self, claims: Sequence[Claim]) -> None:
        """These were given to this worker."""
        for claim in claims:
            self.meter.observe("queue_time", claim.waited, claim.queue)

    def stored(self, holding: Holding, row: Progress) -> None:
        """Redis has confirmed this checkpoint; the holding does not know yet."""
        queue = holding.claim.queue
        self.meter.count("checkpoints", 1, queue)
        self.meter.count("renewals", 1)
        state = row.state.size if isinstance(row.state, PackedState) else len(row.state or b"")
        self.meter.observe("checkpoint_bytes", len(row.blob) + state, queue)
        self._put_out(holding, row)

    def answered(self, seconds: float, interval: float) -> None:
        """A call that stored checkpoints took so long; ``interval`` (seconds) is that from one to the next."""
        self.meter.observe("checkpoint", seconds)
        self.meter.observe("checkpoint_interval", interval)

    def renewed(self, number: int) -> None:
        """So many leases were renewed by themselves."""
        self.meter.count("renewals", number)

    def finished(self, holding: Holding, row: Finish) -> None:
        """Redis has confirmed the end of a request."""
        claim = holding.claim
        self._put_out(holding, row)
        self.meter.observe("e2e_request_latency", claim.age + time.monotonic() - holding.began, claim.queue)
        outputs = row.offset + row.outputs - claim.offset
        if outputs > 1 and holding.last_output > holding.first_output:
            each = (holding.last_output - holding.first_output) / (outputs - 1)
            self.meter.observe("time_per_output_token", each, claim.queue)
        self._trace(holding, "finished", outputs=outputs)

    def left(self, holding: Holding, outcome: str, kind: str = "") -> None:
        """An execution has ended without a result: ``outcome`` is failed, canceled or released.

        Of one that was lost nothing is told here: whoever has it now tells it (:meth:`_put_out`).
        """
        self._trace(holding, outcome, kind, outputs=holding.offset - holding.claim.offset)

    def _trace(self, holding: Holding, outcome: str, kind: str = "", *, outputs: int) -> None:
        claim = holding.claim
        processed(
            claim,
            seconds=time.monotonic() - holding.began,
            outcome=outcome,
            kind=kind,
            outputs=outputs,
            checkpoints=holding.seq - claim.seq,
            worker=self.worker,
        )

    def _put_out(self, holding: Holding, row: Progress | Finish) -> None:
        """Something of this execution is in Redis, where its client can see it."""
        claim = holding.claim
        if row.outputs:
            self.meter.count("outputs", row.outputs, claim.queue)
            if not row.offset and not claim.epoch:
                self.meter.observe("time_to_first_token", claim.age + time.monotonic() - holding.began, claim.queue)
        if claim.interruption is not None and not holding.moving:
            pause = claim.paused + time.monotonic() - holding.began
            self.meter.observe("recovery", pause, claim.queue, claim.interruption.kind)
            lost(claim)
        holding.moving = True

    def flush(self, store: Store, incarnation: str, *intervals: float, last: bool = False) -> None:
        """Send the figures, if it is time; ``last``, in any case. Raises what redis-py raises.

        ``intervals``: seconds from one checkpoint to the next, now and while Redis is quick.
        """
        now = time.monotonic()
        if last or now - self._sent >= self.interval:
            self._sent = now
            self.meter.flush(incarnation, store.measure, *intervals)
