"""A way to Redis that takes time: every piece arrives later by so much, in order, and no fewer of them a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from ...pool.relay import Relay


class SlowRoad(Relay):
    """Forwards with ``delay`` seconds on the way there, none back. A ``with`` block ends it."""

    def __init__(self, host: str, port: int, delay: float) -> None:
        super().__init__(host, port)
        self.delay = delay

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def pumps(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> list[Coroutine[Any, Any, None]]:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        return [self._take(reader, pieces), self._deliver(pieces, far_writer), self._back(far_reader, writer)]

    async def _take(self, source: asyncio.StreamReader, pieces: asyncio.Queue[tuple[float, bytes]]) -> None:
        while data := await source.read(65536):
            pieces.put_nowait((time.monotonic() + self.delay, data))

    async def _deliver(self, pieces: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        while True:
            due, data = await pieces.get()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            target.write(data)
            await target.drain()

    async def _back(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
