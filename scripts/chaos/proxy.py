"""A proxy on loopback, between a part of the pool and Redis: the network that can be harmed.

It runs in a thread of its own. Others set what is to go wrong, and read in :attr:`Proxy.happened` how often it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections import Counter
from typing import Final

from ...protocol.scripts import load

SLOW_PIECE: Final = 512
"""Bytes of a slow connection that come at once."""

SCRIPTS: Final = ("claim", "progress", "finish", "enqueue", "release", "heartbeat")
"""Scripts whose replies can be hidden; what each of them has done must not be done again."""

_POLL: Final = 0.01


class Proxy:
    """Forwards bytes; :meth:`start`, set what is to go wrong, :meth:`stop`.

    ``cuts`` and ``hides``: so many replies of the next are cut in the middle, or hidden after the command was
    applied (the connection ends with it). ``silent``: nothing is forwarded, and nothing is closed. ``delay``:
    seconds before each piece.
    """

    def __init__(self, host: str, port: int) -> None:
        self.cuts = 0
        self.hides = 0
        self.silent = False
        self.delay = 0.0
        self.happened: Counter[str] = Counter()
        self.port = 0
        self._far = (host, port)
        self._shas = [hashlib.sha1(load(name).source.encode()).hexdigest().encode() for name in SCRIPTS]
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._listening.wait()

    def stop(self) -> None:
        """End all connections. Harmless when repeated."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(2.0)

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.cuts = self.hides = 0
        self.silent, self.delay = False, 0.0

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._far)
        except OSError:
            writer.close()
            return
        # Whether the last command was a script whose reply may be hidden.
        told = asyncio.Event()
        pumps = [
            asyncio.ensure_future(self._commands(reader, far_writer, told)),
            asyncio.ensure_future(self._replies(far_reader, writer, told)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in (writer, far_writer):
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

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
