"""Frames for all who watch, as server-sent events. One reader, however many viewers; none while nobody looks."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Final

from ...protocol.errors import PerdureError
from .access import Message, Receive, Send

log = logging.getLogger("perdure.web")

MOST: Final = 64
"""Viewers at a time."""

PING: Final = 10.0
"""Seconds of silence after which a comment is sent: proxies cut what is silent, and a dead viewer shows."""

STALL: Final = 30.0
"""Seconds that a viewer may take to accept what is sent; then it is dropped, and may come again."""

RETRY: Final = 2000
"""Milliseconds after which a browser comes again."""

KEPT: Final = 120
"""Frames of which a newcomer gets the figures, for its curves."""


class Broadcast:
    """Looks while somebody watches, and tells all viewers the same. To be used on one event loop.

    ``look`` takes a frame; it blocks, and is called in a thread. A frame that cannot be had is one too: it says since
    when, and the last good one stays with the viewer. Who is slow misses frames, and delays nobody.
    """

    def __init__(self, look: Callable[[], dict[str, Any]], every: float) -> None:
        self._look = look
        self._every = every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self._viewers = 0
        self._closed = False
        self._number = 0
        self._latest = b""
        self._history: deque[list[float | None]] = deque(maxlen=KEPT)
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._away: float | None = None

    @property
    def viewers(self) -> int:
        """How many watch now."""
        return self._viewers

    @property
    def full(self) -> bool:
        """Whether no further viewer is let in."""
        return self._viewers >= MOST or self._closed

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._changed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """What one viewer is sent."""
        self._viewers += 1
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run())
            yield f"retry: {RETRY}\n".encode() + event("history", list(self._history))
            seen = 0
            while not self._closed:
                if self._number != seen and self._latest:
                    seen = self._number
                    yield self._latest
                    continue
                try:
                    await asyncio.wait_for(self._changed.wait(), PING)
                except TimeoutError:
                    yield b": nothing new\n\n"
        finally:
            self._viewers -= 1

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        # What was seen before the last viewer left may be hours old.
        self._latest = b""
        while self._viewers and not self._closed:
            began = loop.time()
            try:
                frame = await loop.run_in_executor(self._thread, self._look)
            except PerdureError as error:
                self._tell(self._absence(error))
            except RuntimeError:
                if not self._closed:  # the thread was taken away
                    raise
            except Exception:
                log.exception("a look at the pool failed")
                self._tell(self._absence(PerdureError("an error that the log of perdure web describes")))
            else:
                self._away = None
                self._history.append(point(frame))
                self._tell(frame)
            await asyncio.sleep(max(self._every / 4, self._every - (loop.time() - began)))

    def _absence(self, error: PerdureError) -> dict[str, Any]:
        self._away = self._away or time.time()
        return {"at": time.time(), "away": {"since": self._away, "reason": str(error)}}

    def _tell(self, frame: dict[str, Any]) -> None:
        self._number += 1
        self._latest = event("frame", frame)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def event(name: str, value: Any) -> bytes:
    """One server-sent event. JSON of ASCII has no line breaks, whatever is in it."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def point(frame: dict[str, Any]) -> list[float | None]:
    """What the curves show of a frame: when, waiting, running, failures that are kept, and the ends a second."""
    queues = frame["queues"]
    rates = [item["per_second"] for item in queues if item["per_second"] is not None]
    ends = round(sum(rate["finished"] for rate in rates), 3) if rates else None
    return [
        round(frame["at"], 3),
        *(sum(item[name] for item in queues) for name in ("waiting", "running", "failed")),
        ends,
        frame["server"]["memory"]["used"],
    ]


class EventStream:
    """The answer that streams to one viewer until it leaves, stalls, or the server ends."""

    def __init__(self, watch: Broadcast) -> None:
        self._watch = watch

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx collects answers otherwise
        ]
        sending = asyncio.create_task(self._send(headers, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._watch.events()) as events:
            async for data in events:
                async with asyncio.timeout(STALL):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
