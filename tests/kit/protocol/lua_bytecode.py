"""Which names a piece of Lua uses without defining them, and which it defines: read from what Lua's compiler makes of
it.

A name that is no local of the piece is compiled to a read of a global, whatever block, string or comment it stands in
or beside: so this is exact, where a search for words is not. Lua 5.1, as in Redis (``lundump.c`` has the format).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import lupa.lua51

STANDARD = {"ipairs", "math", "next", "pairs", "select", "string", "table", "tonumber", "tostring", "type", "unpack"}
"""What scripts use of Lua's own."""

_GETGLOBAL, _SETGLOBAL = 5, 7
_NIL, _BOOLEAN, _NUMBER = 0, 1, 3


@dataclass(frozen=True, slots=True)
class Names:
    """Of one piece of source."""

    free: frozenset[str]
    """Used or set, and not defined here."""
    defined: frozenset[str]
    """Locals that what follows the piece can use."""


def names(source: str) -> Names:
    """Compile a piece of source. Raises ``lupa.lua51.LuaError`` for what is no Lua."""
    lua = lupa.lua51.LuaRuntime(encoding=None)
    dump = lua.eval(b"function(source) return string.dump(assert(loadstring(source))) end")
    reader = _Reader(dump(source.encode()))
    free: set[str] = set()
    return Names(defined=frozenset(reader.function(free)), free=frozenset(free))


class _Reader:
    """Of a compiled piece, front to back."""

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.at = 12  # behind the header

    def take(self, number: int) -> bytes:
        self.at += number
        return self.code[self.at - number : self.at]

    def integer(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def text(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).removesuffix(b"\0").decode(errors="replace")

    def constant(self) -> object:
        kind = self.take(1)[0]
        if kind == _NIL:
            return None
        if kind == _BOOLEAN:
            return bool(self.take(1)[0])
        return struct.unpack("<d", self.take(8))[0] if kind == _NUMBER else self.text()

    def function(self, free: set[str]) -> set[str]:
        """Read one function and those in it; adds to ``free``. Returns the locals that it has when it ends."""
        self.text()  # where it comes from
        self.take(2 * 4 + 4)  # its lines, and how many upvalues, parameters and registers it has
        code = [self.integer() for _ in range(self.integer())]
        constants = [self.constant() for _ in range(self.integer())]
        for instruction in code:
            if instruction & 63 in (_GETGLOBAL, _SETGLOBAL):
                free.add(str(constants[instruction >> 14]))
        for _ in range(self.integer()):
            self.function(free)
        self.take(4 * self.integer())  # a line for each instruction
        found = [(self.text(), self.integer(), self.integer()) for _ in range(self.integer())]
        for _ in range(self.integer()):
            self.text()  # names of upvalues
        # The last instruction is the return that the compiler adds.
        return {name for name, _, end in found if end >= len(code) - 1 and not name.startswith("(")}
