"""A proxy on loopback, between a part of the pool and Redis: the network that can be harmed.

It runs in a thread of its own. Others set what is to go wrong, and read in :attr:`Proxy.happened` how often it did.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, Final

from ...protocol.scripts import digest, load
from ..pool.relay import Relay

SLOW_PIECE: Final = 512
"""Bytes of a slow connection that come at once."""

SCRIPTS: Final = ("claim", "progress", "finish", "enqueue", "release", "heartbeat")
"""Scripts whose replies can be hidden; what each of them has done must not be done again."""

_POLL: Final = 0.01


class Proxy(Relay):
    """Forwards bytes; :meth:`start`, set what is to go wrong, :meth:`stop`.

    ``cuts`` and ``hides``: so many replies of the next are cut in the middle, or hidden after the command was
    applied (the connection ends with it). ``silent``: nothing is forwarded, and nothing is closed. ``delay``:
    seconds before each piece.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.cuts = 0
        self.hides = 0
        self.silent = False
        self.delay = 0.0
        self.happened: Counter[str] = Counter()
        self._shas = [digest(load(name).source).encode() for name in SCRIPTS]

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.cuts = self.hides = 0
        self.silent, self.delay = False, 0.0

    def pumps(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> list[Coroutine[Any, Any, None]]:
        # Whether the last command was a script whose reply may be hidden.
        told = asyncio.Event()
        return [self._commands(reader, far_writer, told), self._replies(far_reader, writer, told)]

    async def _commands(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, told: asyncio.Event) -> None:
        rest = b""
        while data := await source.read(65536):
            text = rest + data
            if any(sha in text for sha in self._shas):
                told.set()
                rest = b""
            else:
                rest = text[-60:]
            await self._forward(target, data)

    async def _replies(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, told: asyncio.Event) -> None:
        while data := await source.read(65536):
            if told.is_set():
                told.clear()
                # An error was not applied; NOSCRIPT is sent again with its source.
                if self.hides > 0 and not data.startswith(b"-"):
                    self.hides -= 1
                    self.happened["hidden_reply"] += 1
                    return
            if self.cuts > 0 and len(data) > 1:
                self.cuts -= 1
                self.happened["cut"] += 1
                await self._forward(target, data[: len(data) // 2])
                return
            await self._forward(target, data)

    async def _forward(self, target: asyncio.StreamWriter, data: bytes) -> None:
        if self.silent:
            self.happened["black_hole"] += 1
        while self.silent:  # noqa: ASYNC110 - set by another thread, which has no event of this loop
            await asyncio.sleep(_POLL)
        if self.delay:
            self.happened["slow"] += 1
            for start in range(0, len(data), SLOW_PIECE):
                await asyncio.sleep(self.delay)
                target.write(data[start : start + SLOW_PIECE])
                await target.drain()
            return
        target.write(data)
        await target.drain()
