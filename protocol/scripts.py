"""The Lua scripts: loaded from ``lua/``, called by name.

Each file is one transition. Its header is the contract: the arguments are named there, in order,
and :meth:`Script.__call__` takes them by those names, so header, Lua and Python cannot drift apart
without an error (tests compare the header with the code as well). What transitions share stands in
``lua/lib/``, one idea a file; each file names those that it uses, in lines ``--- @include lib/lease/runs``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from operator import itemgetter
from typing import Any

import redis

from .codec import pack_exception
from .keys import NAMES

Argument = str | bytes | int | float
Row = Mapping[str, Argument]

GIVE_WAY = ("enqueue", "progress", "chunk")
"""Scripts that Redis may refuse at maxmemory: they store something new. All others must pass, or no request would
end and no lease be renewed: they begin with ``never_refused()``."""


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

    def __init__(self, name: str, body: str, source: str) -> None:
        """``body`` is the file; ``source`` is what the server gets: see :func:`linked`."""
        self.name = name
        self.body = body
        self.header = Header.parse(body)
        self.source = source
        self._names = frozenset(self.header.arguments)
        self._pick = {group: itemgetter(*names) for group, names in self.header.groups.items()}

    def arguments(self, values: Row, groups: Mapping[str, Sequence[Row]]) -> list[Argument]:
        """Put named values into the order of the header. Raises ``TypeError`` for a missing or unknown name."""
        if values.keys() != self._names or groups.keys() != self._pick.keys():
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

    def in_turn(
        self, connection: redis.Redis, calls: Iterable[tuple[Row, Mapping[str, Sequence[Row]]]]
    ) -> Iterator[Any]:
        """Run the script for each, in order and over one connection; the next call is made and on its way while an
        answer is waited for.

        Raises what redis-py raises, ``NoScriptError`` too: then the call whose answer is missing, and the one after
        it, may have run or not.
        """
        name, on_way = digest(self.source), 0
        with connection.client() as client:  # type: ignore[no-untyped-call]
            line = client.connection
            try:
                for values, groups in calls:
                    line.send_command("EVALSHA", name, 1, NAMES["schema"], *self.arguments(values, groups))
                    on_way += 1
                    if on_way > 1:
                        yield line.read_response()
                        on_way -= 1
                while on_way:
                    yield line.read_response()
                    on_way -= 1
            except BaseException:
                line.disconnect()  # an answer that nobody reads is not to be the next command's
                raise


@cache
def digest(source: str) -> str:
    """The name under which a server knows a script. (redis-py's Script hashes up to 45 KB of source at every use.)"""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class IncludeError(Exception):
    """A Lua file includes one that is not there, or itself by way of others."""


def linked(name: str, folder: Traversable) -> str:
    """The source of the transition ``<folder>/<name>.lua``, as the server gets it, without comments.

    In front of a file stand those that it includes, each once; in front of all stand the names of the keys that are
    used. Redis runs the whole source at each call, and makes every function in it again (0.2 us each): so a file
    includes no more than it uses, which tests check.

    Making a function costs more the more locals stand between it and those that it uses. What nearly all use stands
    outside of a function that holds the rest, where it is found at once: of a claim, a fifth of what making its
    functions costs.

    Raises :class:`IncludeError`.
    """
    texts = {other: _COMMENT.sub("", text) for other, text in _in_order(name, folder, [], {}).items()}
    outer = "".join(text for other, text in texts.items() if other in _OUTER)
    inner = "".join(text for other, text in texts.items() if other not in _OUTER)
    code = f"{outer}return (function()\n{inner}end)()\n"
    keys = set(re.findall(r"\bKEY\.(\w+)", code))
    rows = ", ".join(f"{name} = '{value}'" for name, value in NAMES.items() if name in keys)
    late = f"local LATE = '{pack_exception(_LATE)}'\n" if re.search(r"\bLATE\b", code) else ""
    return f"local KEY = {{ {rows} }}\n{late}{code}"


def _in_order(name: str, folder: Traversable, way: list[str], found: dict[str, str]) -> dict[str, str]:
    """Add the text of a file to ``found``, after the texts of those that it includes. ``way`` leads to it."""
    if name in way:
        circle = " -> ".join([*way[way.index(name) :], name])
        raise IncludeError(
            f"Lua files in {folder} include each other in a circle: {circle}. Move what both use into a third one"
        )
    if name not in found:
        file = folder / f"{name}.lua"
        if not file.is_file():
            why = f", which {way[-1]}.lua includes" if way else ""
            raise IncludeError(f"there is no Lua file {file}{why}")
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r".*@include.*", text):
            if not _INCLUDE.fullmatch(line):
                raise IncludeError(f"{file} has a line that is not an include ('--- @include lib/lease/runs'): {line}")
        for other in _INCLUDE.findall(text):
            _in_order(other, folder, [*way, name], found)
        found[name] = text
    return found


_OUTER = ("lib/basics/arguments", "lib/basics/counters", "lib/basics/numbers", "lib/basics/time")
"""Few names that nearly every file uses. They include nothing but each other."""
_INCLUDE = re.compile(r"^--- @include (\S+)$", re.MULTILINE)
_COMMENT = re.compile(r"^ *--.*\n|^\n", re.MULTILINE)
_LATE = "DEADLINE: the deadline passed before the request ended"
"""What RQ's result stream holds of a missed deadline: the scripts end such a request, and cannot compress."""


@cache
def load(name: str) -> Script:
    """The transition ``lua/<name>.lua``."""
    folder = files(__package__) / "lua"
    return Script(name, (folder / f"{name}.lua").read_text(encoding="utf-8"), linked(name, folder))


def names() -> list[str]:
    """All transitions, sorted."""
    return sorted(name for name in _below(files(__package__) / "lua") if "/" not in name)


def included() -> list[str]:
    """The files that transitions include, sorted: ``lib/lease/runs``, and ``claim/runnable`` of the steps of one."""
    return sorted(name for name in _below(files(__package__) / "lua") if "/" in name)


def _below(folder: Traversable, way: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _below(entry, f"{way}{entry.name}/")
        elif entry.name.endswith(".lua"):
            yield f"{way}{entry.name.removesuffix('.lua')}"
