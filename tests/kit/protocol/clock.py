"""Scripts under a clock that a test moves, and a look at all that stands in Redis at once.

The clock is one line of ``lib/basics/time.lua``. Here, and nowhere else, it is read from a key instead of the server;
so a test lets hours pass in a moment, and the same steps meet the same times whenever they are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import redis

from perdure.protocol import scripts, store
from perdure.protocol.keys import key
from perdure.protocol.scripts import Script
from perdure.protocol.transitions import sweeps

CLOCK = "test:clock"
"""Holds the time that the scripts see, in ms since 1970."""

START_MS = 1_800_000_000_000

_REAL = "local clock = redis.call('TIME')"
_PRETENDED = (
    f"local test_ms = tonumber(redis.call('GET', '{CLOCK}'))\n"
    "local clock = { string.format('%.0f', math.floor(test_ms / 1000)), string.format('%.0f', test_ms % 1000 * 1000) }"
)

# What a server does as time passes: keys expire. ARGV: ms.
_PASS = f"""
local ms = tonumber(ARGV[1])
redis.call('INCRBY', '{CLOCK}', ms)
for _, name in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', name)
  if left >= 0 then
    if left <= ms then redis.call('DEL', name) else redis.call('PEXPIRE', name, left - ms) end
  end
end
"""

_LOOK = """
local rows = {}
for _, name in ipairs(redis.call('KEYS', '*')) do
  local kind, value = redis.call('TYPE', name).ok, false
  if kind == 'hash' then value = redis.call('HGETALL', name)
  elseif kind == 'list' then value = redis.call('LRANGE', name, 0, -1)
  elseif kind == 'set' then value = redis.call('SMEMBERS', name)
  elseif kind == 'zset' then value = redis.call('ZRANGE', name, 0, -1, 'WITHSCORES')
  elseif kind == 'stream' then value = redis.call('XRANGE', name, '-', '+')
  else value = { redis.call('GET', name) } end
  rows[#rows + 1] = { name, value, redis.call('TTL', name) }
end
return rows
"""

Change = tuple[str, str]
"""A piece of a script and what stands there instead: a mistake that somebody might make."""


@contextmanager
def pretended_clock(changes: Mapping[str, Change] | None = None) -> Iterator[None]:
    """Within, every store runs the real scripts under :data:`CLOCK`; ``changes`` plants a mistake in the named ones.

    A name such as ``lib/checkpoint/store`` changes what several of them share.
    """
    planted = dict(changes or {})
    shared = {name for name in planted if name not in scripts.names()}
    for name in shared:
        assert any(planted[name][0] in scripts.load(script).source for script in scripts.names()), (
            f"no script has {name}"
        )

    @cache
    def load(name: str) -> Script:
        real = scripts.load(name)
        assert real.source.count(_REAL) <= 1
        script = Script(name, real.body, real.source.replace(_REAL, _PRETENDED))
        for where in shared | ({name} & planted.keys()):
            before, after = planted[where]
            assert script.source.count(before) in ((0, 1) if where in shared else (1,)), (
                f"{where}: {before!r} stands there {script.source.count(before)} times"
            )
            script.source = script.source.replace(before, after)
        return script

    with pytest.MonkeyPatch.context() as patch:
        for module in (store, sweeps):
            patch.setattr(module, "load", load)
        yield


class Clock:
    """The time that the scripts see."""

    def __init__(self, connection: redis.Redis) -> None:
        self.connection = connection
        self.now = START_MS
        self._pass: Callable[..., Any] = connection.register_script(_PASS)
        connection.set(CLOCK, self.now)

    def advance(self, seconds: float) -> None:
        """Let time pass; what has a TTL expires by it."""
        self._pass(args=[round(seconds * 1000)])
        self.now += round(seconds * 1000)

    def step(self, seconds: float) -> None:
        """The server's clock is set ahead, or back: no time passes."""
        self.now += round(seconds * 1000)
        self.connection.set(CLOCK, self.now)


class Look:
    """All keys at one moment, as text (outputs and states as bytes)."""

    def __init__(self, connection: redis.Redis) -> None:
        rows: Any = connection.register_script(_LOOK)()
        self.raw = {name.decode(): value for name, value, _ in rows}
        self.ttl = {name.decode(): int(ttl) for name, _, ttl in rows}
        self._zsets: dict[str, dict[str, float]] = {}

    def hash(self, name: str) -> dict[str, str]:
        found = self.raw.get(name, [])
        return {a.decode(): b.decode(errors="replace") for a, b in zip(found[::2], found[1::2], strict=True)}

    def field(self, name: str, field: str) -> bytes | None:
        found = self.raw.get(name, [])
        return next((b for a, b in zip(found[::2], found[1::2], strict=True) if a == field.encode()), None)

    def zset(self, name: str) -> dict[str, float]:
        if name not in self._zsets:
            found = self.raw.get(name, [])
            self._zsets[name] = {a.decode(): float(b) for a, b in zip(found[::2], found[1::2], strict=True)}
        return self._zsets[name]

    def names(self, name: str) -> list[str]:
        """Members of a list or set."""
        return [item.decode() for item in self.raw.get(name, [])]

    def below(self, stem: str) -> dict[str, str]:
        """What follows the stem of every key below it -> the key."""
        return {name.removeprefix(key(stem)): name for name in self.raw if name.startswith(key(stem))}


# What moves with the clock alone is renewed by a second sending; a lease may grow longer, nothing else changes.
CLOCKS = ("counters", "leases", "checkpoints", "pulse", "beats")
