"""The Lua scripts: loaded from ``lua/``, called by name.

Each file is one transition. Its header is the contract: the arguments are named there, in order,
and :meth:`Script.__call__` takes them by those names, so header, Lua and Python cannot drift apart
without an error (tests compare the header with the code as well).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        self.source = linked(prelude, ("" if name in GIVE_WAY else "never_refused()\n") + body)
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
    """The name under which a server knows a script. (redis-py's Script hashes the source, 40 KB, at every use.)"""
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


def linked(prelude: str, body: str) -> str:
    """The source of a script: of the prelude only what it uses, and the names of keys that stand in that.

    Redis runs the whole source at each call, and so makes all functions of the prelude again, of which a script needs a few:
    24 us of a script that does nothing else. A piece of the prelude begins with ``local`` in the first column, and uses
    only what stands before it.
    """
    used = set(_WORD.findall(body))
    kept = []
    for piece in reversed(re.split(r"^(?=local )", _COMMENT.sub("", prelude), flags=re.MULTILINE)[1:]):
        first = piece.partition("\n")[0].partition("=")[0].removeprefix("local ").removeprefix("function ")
        names = _WORD.findall(first.partition("(")[0])
        if not used.isdisjoint(names) or "clock" in names:
            kept.append(piece.rstrip() + "\n")
            used |= set(_WORD.findall(piece))
    code = "".join(reversed(kept)) + body
    keys = set(re.findall(r"\bKEY\.(\w+)", code)) | (_BY_VERDICT if "KEY[" in code else set())
    rows = ", ".join(f"{name} = '{value}'" for name, value in NAMES.items() if name in keys)
    return f"local KEY = {{ {rows} }}\n{code}"


_WORD = re.compile(r"[A-Za-z_]\w*")
_COMMENT = re.compile(r"^ *--.*\n", re.MULTILINE)
_BY_VERDICT = {"finished", "failed", "canceled"}
"""The registries that scripts look up by a request's verdict: ``KEY[verdict]``."""


def _late() -> str:
    """What RQ's result stream holds of a missed deadline: the scripts end such a request, and cannot compress."""
    return f"local LATE = '{pack_exception('DEADLINE: the deadline passed before the request ended')}'\n"


@cache
def load(name: str) -> Script:
    """The script ``lua/<name>.lua`` behind the shared prelude."""
    folder = files(__package__) / "lua"
    prelude = _late() + (folder / "prelude.lua").read_text(encoding="utf-8")
    return Script(name, (folder / f"{name}.lua").read_text(encoding="utf-8"), prelude)


def names() -> list[str]:
    """All transitions, sorted."""
    return sorted(
        entry.name.removesuffix(".lua")
        for entry in (files(__package__) / "lua").iterdir()
        if entry.name.endswith(".lua") and entry.name != "prelude.lua"
    )
