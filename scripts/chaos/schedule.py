"""What happens when: a seed makes the schedule, and the same seed makes it again. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...protocol.errors import UsageError
from ...protocol.settings import Settings

START: Final = 6.0
"""Seconds at the beginning that belong to the start of the pool."""

SETTLE: Final = 5.0
"""Seconds at the end in which nothing new befalls the pool."""

PAUSE: Final = 0.35
"""Seconds between two faults at least."""

CALM: Final = 0.8
"""Seconds of peace after a fault that takes Redis away from everybody, before the next one does."""

SPREAD: Final = 2.0
"""How much slower than at least the faults come when there is time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that faults last, for the settings of a pool; ``scale`` divides what is not ruled by a setting."""

    scale: float
    settings: Settings

    @property
    def outage(self) -> float:
        """12 s with the scale 1."""
        return max(0.5, 12.0 / self.scale)

    @property
    def freeze(self) -> float:
        """Longer than the lease and than a heartbeat may be late."""
        return 1.2 * max(self.settings.lease, self.settings.heartbeat_timeout) + 2 * self.settings.reap_interval

    @property
    def visit(self) -> float:
        """For a process that comes, works for a while and leaves."""
        return max(4.0, 20.0 / self.scale)

    @property
    def poison(self) -> float:
        """Until a request that ends each of its workers is a dead letter: they are replaced with growing pauses."""
        return max(6.0, 200.0 / self.scale)

    @property
    def moment(self) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    ``lasts`` names the field of :class:`Timing`; ``needs`` is what there must be: ``server`` (one of our own),
    ``proxy``, ``faketime``, ``clock`` (a server of our own under faketime). ``alone``: it takes Redis away from
    everybody, and no other such fault may overlap.
    """

    name: str
    text: str
    lasts: str = "moment"
    weight: int = 1
    kills: int = 0
    needs: str = ""
    alone: bool = False


KINDS: Final[tuple[Kind, ...]] = (
    Kind("kill_worker", "SIGKILL of a worker", weight=9, kills=1),
    Kind("kill_guardian", "SIGKILL of a guardian", weight=3, kills=1),
    Kind("kill_tree", "SIGKILL of a worker with its whole tree", weight=5, kills=1),
    Kind("kill_supervisor", "SIGKILL of a supervisor", weight=1, kills=1),
    Kind("kill_reaper", "SIGKILL of a reaper", weight=2, kills=1),
    Kind("kill_producer", "SIGKILL of a producer with open streams", weight=3, kills=1),
    Kind("zombie", "SIGSTOP of worker and guardian for longer than the lease, then SIGCONT", "freeze"),
    Kind("hang", "a step that sleeps for longer than the lease", "freeze"),
    Kind("hang_gil", "the same, holding the GIL", "freeze"),
    Kind("crash", "a native crash (SIGSEGV)", weight=2),
    Kind("redis_kill", "SIGKILL of Redis (appendfsync always), restart from its file", "outage", 2, 1, "server", True),
    Kind("redis_stop", "SIGSTOP of Redis", "outage", 1, 0, "server", True),
    Kind("script_flush", "SCRIPT FLUSH", weight=2, needs="server"),
    Kind("client_kill", "CLIENT KILL of every connection", weight=2, needs="server"),
    Kind("full", "Redis at maxmemory", "outage", 1, 0, "server", True),
    Kind("busy", "a script that runs for longer than its time limit", "outage", 1, 0, "server", True),
    Kind(
        "no_replicas",
        "Redis that wants a replica for each write (min-replicas-to-write)",
        "outage",
        1,
        0,
        "server",
        True,
    ),
    Kind("cut", "connections cut in the middle of a reply", "outage", 2, 0, "proxy"),
    Kind("hidden_reply", "replies hidden after the command was applied", "outage", 3, 0, "proxy"),
    Kind("black_hole", "connections that swallow everything", "outage", 1, 0, "proxy", True),
    Kind("slow", "a slow connection", "outage", 1, 0, "proxy"),
    Kind("clock_ahead", "a worker whose clock is 1 h ahead", "visit", 1, 0, "faketime"),
    Kind("clock_behind", "a worker whose clock is 1 h behind", "visit", 1, 0, "faketime"),
    Kind("clock_step", "Redis' own clock set an hour ahead or back, and right again", "visit", 1, 0, "clock"),
    Kind("same_name", "two workers with one name", "visit"),
    Kind("second_reaper", "one more reaper", "visit"),
    Kind("no_reaper", "no reaper at all, and a worker lost with its tree", "freeze", 1, 1),
    Kind("other_model", "a worker with another model", "visit"),
    Kind("half_broken", "a worker that lacks the tasks' module", "visit"),
    Kind("reuse", "a request that is deleted, and its id submitted again", weight=2),
    Kind("poison_raises", "a request whose step raises in a batch, each time", "poison"),
    Kind("poison_exits", "a request whose step ends its process (os._exit), each time", "poison"),
)

NAMES: Final = {kind.name: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault to come: seconds after the start of the run, how long it lasts, and a number in [0, 1) that chooses
    its victim among those that are there then.
    """

    at: float
    kind: str
    lasts: float
    choice: float


def least(kinds: Sequence[Kind], timing: Timing) -> float:
    """Seconds that a run needs at least, so that each kind can happen once and be over."""
    longest = max((_lasts(kind, timing) for kind in kinds), default=0.0)
    return START + sum(_step(kind, timing) for kind in kinds) + longest + SETTLE


def plan(seed: int, seconds: float, kinds: Sequence[Kind], timing: Timing) -> list[Planned]:
    """Each kind once in an order of chance, then any by weight until the time is over; sorted by time.

    Raises :class:`UsageError` for a run that is too short.
    """
    if not kinds:
        return []
    needed = least(kinds, timing)
    if seconds < needed:
        raise UsageError(
            f"{len(kinds)} kinds of faults need at least --seconds {int(needed) + 1} (here {seconds:g}): "
            "give more time, a larger --scale, or fewer kinds (--only, --without)"
        )
    chance = random.Random(seed)
    end = seconds - SETTLE
    slower = min(SPREAD, 1 + (seconds - needed) / (needed - START))
    # The long ones first, within an order of chance: nothing waits at the end.
    once = sorted(chance.sample(list(kinds), len(kinds)), key=lambda kind: -round(_lasts(kind, timing)))
    planned: list[Planned] = []
    at = START
    for kind in once:
        planned.append(Planned(round(at, 3), kind.name, _lasts(kind, timing), chance.random()))
        at += _step(kind, timing) * slower
    while True:
        (kind,) = chance.choices(list(kinds), [kind.weight for kind in kinds])
        lasts, choice, stretch = _lasts(kind, timing), chance.random(), chance.uniform(0.6, 1.4)
        if at + _step(kind, timing) > end:
            return planned
        if at + lasts <= end:
            planned.append(Planned(round(at, 3), kind.name, lasts, choice))
        at += max(_step(kind, timing), (_step(kind, timing) if kind.alone else 0.7) * stretch * slower)


def _lasts(kind: Kind, timing: Timing) -> float:
    return float(getattr(timing, kind.lasts))


def _step(kind: Kind, timing: Timing) -> float:
    """Seconds until the next fault may come."""
    return _lasts(kind, timing) + CALM if kind.alone else PAUSE
