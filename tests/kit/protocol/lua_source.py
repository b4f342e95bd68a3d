"""What the Lua scripts do to Redis, read from their source: which fields they write, what they count,
what they tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

from perdure.protocol import scripts
from perdure.protocol.records import STORED
from perdure.protocol.transitions.rows import kept

HASHES = {
    "job": ("KEY.job .. id",),
    "checkpoint": ("KEY.checkpoint .. id",),
    "incarnation": ("KEY.incarnation .. incarnation", "KEY.incarnation .. holder"),
    "mode": ("KEY.mode",),
    "pulse": ("KEY.pulse",),
    "worker": ("KEY.worker .. worker",),
    "execution": ("KEY.execution .. composite",),
}
"""Hash -> the expressions that name it in the scripts."""


@cache
def sources() -> dict[str, str]:
    """Name of a transition, or of a file that they share (``lib/lease/runs``) -> its code without comments."""
    folder = files("perdure.protocol") / "lua"
    return {
        name: re.sub(r"(?m)--[^\n]*$", "", (folder / f"{name}.lua").read_text(encoding="utf-8"))
        for name in (*scripts.included(), *scripts.names())
    }


def split(text: str) -> list[str]:
    """The expressions of an argument or table list, which ends with the bracket that closes it."""
    depth, quote, parts = 0, False, [""]
    for letter in text:
        quote ^= letter == "'"
        if not quote:
            depth += (letter in "({[") - (letter in ")}]")
            if depth < 0:
                break
            if letter == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _named(source: str, at: int, expression: str) -> str | None:
    """The hash that an expression names at a place of a script."""
    if re.fullmatch(r"\w+", expression):  # a local: what it was bound to last, in a line such as `local a, b = c, d`
        for names, values in reversed(re.findall(r"local ([\w, ]+) = (.+)", source[:at])):
            bound = dict(zip(split(names), split(values), strict=False))
            if expression in bound:
                expression = bound[expression]
                break
    return next((name for name, known in HASHES.items() if expression in known), None)


def _literal(expression: str) -> str | None:
    match = re.fullmatch(r"'([\w ]*)'", expression)
    return match[1] if match else None


def written() -> Iterator[tuple[str, str]]:
    """Each hash and field that a script writes. Raises where it writes one in a way that is not seen here."""
    for script, source in sources().items():
        for match in re.finditer(r"redis\.p?call\('(?:HSET|HSETNX)', |(?<![\w.])add\((?=KEY|name|record)", source):
            name, *fields = split(source[match.end() :])
            found = _named(source, match.start(), name)
            if found is None:
                assert name in (
                    "KEY.counters",
                    "KEY.unfit",
                    "name",
                    "KEY.held .. incarnation",
                    "KEY.limit .. limit[1]",
                ), (script, name)
                continue
            if match[0].startswith("add"):
                fields = fields[:2]
            for field, _ in zip(fields[::2], fields[1::2], strict=False):
                literal = _literal(field)
                if literal is None:
                    assert field in ("field",), (script, name, field)
                    continue
                yield found, literal
        for text in re.findall(r"(?<!function )change\(job, ([^,]+),", source):
            literal = _literal(text)
            assert literal, (script, text)
            yield "job", literal
        for match in re.finditer(r"(?<!function )mark_ended\(", source):
            for field in split(source[match.end() :])[3::2]:
                literal = _literal(field)
                assert literal, (script, field)
                yield "job", literal
    enqueue = sources()["enqueue"]
    for table in re.finditer(r"kind\.fields = \{", enqueue):
        for field in split(enqueue[table.end() :])[::2]:
            literal = _literal(field)
            assert literal, field
            yield "job", literal
    for field in re.findall(r"\bfield\(kind, '(\w+)', ", enqueue):
        yield "job", field
    for field in kept():
        yield "checkpoint", field
    for stored in STORED.values():
        for field in stored:
            yield "job", field


def counted() -> set[str]:
    """The events of the counters: ``count('event', ...)`` and ``count('event:' .. queue, reason)``."""
    found = set()
    for source in sources().values():
        found |= set(re.findall(r"(?<![\w.])(?:count|tally)\('(\w+):?'", source))
        found |= set(re.findall(r"add\(KEY\.counters, '(\w+)'", source))
    return found


def told() -> set[str]:
    """The events of a history."""
    found = set()
    for source in sources().values():
        for match in re.finditer(r"(?<![\w.])history\(id, ", source):
            event = split(source[match.end() :])[0]
            words = re.findall(r"'(\w+)'", event.partition(" and ")[2] or event)
            found |= set(words)
            if not words:
                assert event in ("state", "event"), event  # the function itself; and `cancel`, which says its state
    return found | {"canceled", "stopped"}
