"""The states of a request, and the moves between them.

The states are RQ's job statuses, and in Redis they are for display: whether a request is held is
decided by its lease and execution alone. :data:`TRANSITIONS` is the one table; documentation and
tests are checked against it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """A request's state; the value is what stands in the job hash under ``status``."""

    CREATED = "created"
    """Not stored yet: the producer holds it."""
    QUEUED = "queued"
    """Waits in its queue. ``claim`` takes it out."""
    SCHEDULED = "scheduled"
    """Waits for a due time (its own delay, or a retry's). ``promote`` or ``claim`` moves it to the queue."""
    STARTED = "started"
    """Held by a worker under a lease."""
    FINISHED = "finished"
    """Ended with a result."""
    FAILED = "failed"
    """Ended without; a dead letter that ``rq requeue`` can revive."""
    CANCELED = "canceled"
    """Ended by ``cancel``."""
    STOPPED = "stopped"
    """Ended by RQ's stop command."""

    @property
    def ended(self) -> bool:
        """True for a state that only a requeue leaves."""
        return self in ENDED


ENDED: Final = frozenset({State.FINISHED, State.FAILED, State.CANCELED, State.STOPPED})

# state -> {next state: the scripts that make the move}
TRANSITIONS: Final[dict[State, dict[State, tuple[str, ...]]]] = {
    State.CREATED: {State.QUEUED: ("enqueue",), State.SCHEDULED: ("enqueue",)},
    State.QUEUED: {
        State.STARTED: ("claim",),
        State.FAILED: ("promote", "claim", "give_up"),
        State.CANCELED: ("cancel",),
    },
    State.SCHEDULED: {
        State.QUEUED: ("promote", "claim"),
        State.FAILED: ("promote", "claim"),
        State.CANCELED: ("cancel",),
    },
    State.STARTED: {
        State.FINISHED: ("finish",),
        State.FAILED: ("fail", "reap", "release", "progress", "renew"),
        State.CANCELED: ("cancel", "fail", "reap", "release"),
        State.STOPPED: ("cancel", "fail", "reap", "release"),
        State.QUEUED: ("release", "fail", "reap", "readmit"),
        State.SCHEDULED: ("fail", "release", "reap"),
    },
    # RQ's own requeue pushes the id; the claim that pops it starts the counts anew.
    State.FINISHED: {State.QUEUED: ("rq requeue",)},
    State.FAILED: {State.QUEUED: ("rq requeue",)},
    State.CANCELED: {State.QUEUED: ("rq requeue",)},
    State.STOPPED: {State.QUEUED: ("rq requeue",)},
}
