"""Checks of single arguments. A wrong one is an :class:`InvalidRequest` that names it, never a puzzle later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

from ..protocol.codec import RestrictedPickle, pack, unpack
from ..protocol.errors import InvalidRequest

Seconds = int | float | timedelta

LONGEST = 100 * 366 * 86400
"""Seconds, and more than anybody keeps: Redis counts milliseconds in 64 bits."""

SHORTEST_STEP = 0.2
"""Seconds. Leases are renewed once per checkpoint interval: a lease as short as that would end before its time."""

_MOST_META = 64 * 1024  # bytes; RQ's tools read it with every job


def whole(value: object, name: str, least: int, most: int | None = None) -> int:
    """A whole number within bounds; a bool is none."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not fits:
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise InvalidRequest(f"{name} must be a whole number {bounds}, not {value!r}", name)
    return value  # type: ignore[return-value]


def flag(value: object, name: str) -> bool:
    """True or False, and nothing that only counts as one."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be True or False, not {value!r}", name)
    return value


def kept(value: object, name: str) -> int:
    """How long something is kept: whole seconds, rounded up."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
        raise InvalidRequest(
            f"{name} must be a number of seconds above 0 and at most 100 years, but is {value!r}", name
        )
    return math.ceil(seconds)


def delayed(value: object, name: str) -> float:
    """How much later something happens, in seconds; 0 is at once."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST:
        raise InvalidRequest(f"{name} must be a number of seconds from 0 to 100 years, but is {value!r}", name)
    return float(seconds)


def due(value: object, name: str) -> tuple[float, float]:
    """A deadline: seconds from now, and seconds since 1970; the one that was not given is 0."""
    if value is None:
        return 0.0, 0.0
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise InvalidRequest(
                f"{name} has no time zone ({value}); give one, as in datetime.now(UTC) + "
                "timedelta(minutes=5), or a number of seconds",
                name,
            )
        # One that has passed is left to the server's clock, which may think otherwise.
        return 0.0, max(0.001, value.timestamp())
    return lasting(value, name), 0.0


def packed_meta(value: object, name: str) -> bytes:
    """RQ's ``meta`` as RQ stores it. Only plain values: nobody should have to unpickle anything else."""
    if value is None:
        return b""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidRequest(f"{name} must be a dict with string keys, not {type(value).__name__}: {value!r:.60}", name)
    # Through msgpack: what comes out is of no class but Python's own.
    plain = unpack(pack(dict(value), limit=_MOST_META, what=name))
    return RestrictedPickle.dumps(plain) if plain else b""


def lasting(value: object, name: str) -> float:
    """A limit in seconds, more than 0; ``None`` is none and gives 0."""
    if value is None:
        return 0.0
    seconds = delayed(value, name)
    if seconds == 0:
        raise InvalidRequest(f"{name} must be a number of seconds above 0, but is {value!r}", name)
    return seconds


def stepping(value: object, name: str) -> float:
    """A step timeout in seconds; ``None`` leaves it to task and worker and gives 0."""
    seconds = lasting(value, name)
    if 0 < seconds < SHORTEST_STEP:
        raise InvalidRequest(f"{name} must be a number of seconds, at least {SHORTEST_STEP}, but is {value!r}", name)
    return seconds


class Default(Enum):
    """What a waiting takes whose caller says nothing; ``None`` is a word of its own: as long as it takes."""

    DEFAULT = "PERDURE_RESPONSE_TIMEOUT"

    def __repr__(self) -> str:
        return self.value


DEFAULT: Final = Default.DEFAULT


def waited(value: object, name: str) -> float:
    """How long something is waited for, in seconds; 0 and infinity are allowed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value < 0:
        raise InvalidRequest(f"{name} must be a number of seconds, 0 or more, but is {value!r}", name)
    return float(value)
