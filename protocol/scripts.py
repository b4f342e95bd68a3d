"""The Lua scripts: loaded from ``lua/``, called by name.

Each file is one transition. Its header is the contract: the arguments are named there, in order,
and :meth:`Script.__call__` takes them by those names, so header, Lua and Python cannot drift apart
without an error (tests compare the header with the code as well).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import Any

import redis

from .codec import pack_exception
from .keys import NAMES

Argument = str | bytes | int | float
Row = Mapping[str, Argument]

# Limits of one call: a longer one would keep every other client of Redis waiting.
MAX_REQUESTS = 128
MAX_BYTES = 8 * 1024 * 1024


GIVE_WAY = ("enqueue", "progress", "chunk")
"""Scripts that Redis may refuse at maxmemory: they store something new. All others must pass, or no request would
end and no lease be renewed."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the comment at the top of a script declares."""

    arguments: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    """Repeated arguments: group name -> the names of one row. Rows follow the plain arguments, each group
    preceded by its number of rows."""

    @classmethod
    def parse(cls, source: str) -> Header:
        """Read ``ARGV name  meaning`` and ``EACH group: name  meaning`` lines of the leading comment."""
        comment = re.match(r"(?:--[^\n]*\n)+", source)
        lines = comment.group().splitlines() if comment else []
        arguments: list[str] = []
        groups: dict[str, list[str]] = {}
        for line in lines:
            if match := re.match(r"-- ARGV +(\w+)", line):
                arguments.append(match[1])
            elif match := re.match(r"-- EACH +(\w+): +(\w+)", line):
                groups.setdefault(match[1], []).append(match[2])
        return cls(tuple(arguments), {name: tuple(names) for name, names in groups.items()})


class Script:
    """One transition. The source is sent once per server (EVALSHA, else load and EVALSHA again)."""

    def __init__(self, name: str, body: str, prelude: str) -> None:
        self.name = name
        self.body = body
        self.header = Header.parse(body)
        self.source = prelude + ("" if name in GIVE_WAY else "never_refused()\n") + body
        self._pick = {group: itemgetter(*names) for group, names in self.header.groups.items()}

    def arguments(self, values: Row, groups: Mapping[str, Sequence[Row]]) -> list[Argument]:
        """Put named values into the order of the header. Raises ``TypeError`` for a missing or unknown name."""
        if set(values) != set(self.header.arguments) or set(groups) != set(self.header.groups):
            raise TypeError(
                f"{self.name}.lua takes {self.header.arguments} and rows {tuple(self.header.groups)}, "
                f"not {tuple(values)} and {tuple(groups)}"
            )
        result: list[Argument] = [values[name] for name in self.header.arguments]
        for group, names in self.header.groups.items():
            pick, single = self._pick[group], len(names) == 1
            result.append(len(groups[group]))
            for row in groups[group]:
                try:
                    picked = pick(row)
                except KeyError:
                    picked = None
                if picked is None or len(row) != len(names):
                    raise TypeError(f"a row of {group} in {self.name}.lua has {names}, not {tuple(row)}")
                if single:
                    result.append(picked)
                else:
                    result += picked
        return result

    def __call__(self, connection: redis.Redis, values: Row, groups: Mapping[str, Sequence[Row]]) -> Any:
        """Run the script. Raises what redis-py raises; nothing is sent again by itself."""
        arguments = self.arguments(values, groups)
        if isinstance(connection, redis.client.Pipeline):
            # Nothing is sent before its end: it asks itself whether the server has the script.
            return connection.register_script(self.source)(keys=[NAMES["schema"]], args=arguments)
        name = digest(self.source)
        try:
            return connection.evalsha(name, 1, NAMES["schema"], *arguments)
        except redis.exceptions.NoScriptError:
            # It has not run: a server forgets its scripts when it starts again.
            connection.script_load(self.source)
            return connection.evalsha(name, 1, NAMES["schema"], *arguments)


@cache
def digest(source: str) -> str:
    """The name under which a server knows a script. (redis-py's Script hashes the source, 40 KB, at every use.)"""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


def _lua_names() -> str:
    """The key table, and a text, as Lua source. Names of keys hold only characters that need no escape."""
    rows = ", ".join(f"{name} = '{value}'" for name, value in NAMES.items())
    # What RQ's result stream holds of a missed deadline: the scripts end such a request, and cannot compress.
    late = pack_exception("DEADLINE: the deadline passed before the request ended")
    return f"local KEY = {{ {rows} }}\nlocal LATE = '{late}'\n"


@cache
def load(name: str) -> Script:
    """The script ``lua/<name>.lua`` behind the shared prelude."""
    folder = files(__package__) / "lua"
    prelude = _lua_names() + (folder / "prelude.lua").read_text(encoding="utf-8")
    return Script(name, (folder / f"{name}.lua").read_text(encoding="utf-8"), prelude)


def names() -> list[str]:
    """All transitions, sorted."""
    return sorted(
        entry.name.removesuffix(".lua")
        for entry in (files(__package__) / "lua").iterdir()
        if entry.name.endswith(".lua") and entry.name != "prelude.lua"
    )
