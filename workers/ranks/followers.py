"""The leader's view of its followers: processes that it starts, tells what to do, and hears of."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from .membership import ending
from .wire import Wire

log: Final = logging.getLogger("rq.worker")

CLOSING: Final = 5.0
"""Seconds after SIGKILL in which a process should be gone."""


class Follower:
    """One process of the group. ``news`` is notified of all that it says, and of its end; ``missed`` is called, by a
    thread that may wait, when it will not come to a collective any more: with the number of the order, or at its end.

    1. started: imports and loads; then it is *ready* for the next epoch.
    2. every order has a number, and is answered once, with the same number. Loading is number 0.
    3. *gone* once its end of the wire is closed, by whatever.
    """

    def __init__(
        self,
        rank: int,
        hello: Mapping[str, Any],
        environment: Mapping[str, str],
        news: threading.Condition,
        missed: Callable[[int | None], None],
    ) -> None:
        # To be called in the main thread: the kernel ends a follower with the *thread* that started it.
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "perdure.workers.ranks.rank", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
            )
        self.rank = rank
        self.ready = False
        """It has loaded, and sits in no epoch."""
        self.fresh = True
        """It has never been ready."""
        self.gone = False
        self.killed = False
        """It was ended by the leader, which says nothing about it."""
        self._answer: tuple[int, str, Any] = (-1, "", None)
        self._news = news
        self._missed = missed
        self._wire = Wire(ours, hello["timeout"])
        threading.Thread(target=self._listen, name=f"rank {rank}", daemon=True).start()
        self.send(dict(hello, rank=rank))

    def answer(self, number: int) -> tuple[str, Any] | None:
        """Its answer to an order: a word, and what belongs to it; ``None`` while there is none."""
        found, word, what = self._answer
        return (word, what) if found == number else None

    def said(self, number: int, word: str) -> bool:
        """Whether it answered an order with this word."""
        answer = self.answer(number)
        return answer is not None and answer[0] == word

    def settled(self, number: int) -> bool:
        """Whether it has answered an order, or never will."""
        return self.gone or self.answer(number) is not None

    def send(self, order: Any) -> None:
        """Give an order. One that does not take it in is ended: it is gone soon."""
        try:
            self._wire.send(order)
        except OSError:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: it must not come back into an epoch that is over."""
        self.killed = True
        self.process.kill()

    def close(self) -> None:
        """End it, and wait for that. One that the kernel cannot end, in a driver's call, is left behind."""
        self.process.kill()
        self._wire.close()
        try:
            self.process.wait(CLOSING)
        except subprocess.TimeoutExpired:
            log.error("rank %d (pid %d) does not end after SIGKILL; leaving it", self.rank, self.process.pid)

    def fate(self) -> str:
        """How a gone process ended."""
        try:
            return ending(self.process.wait(1.0))
        except subprocess.TimeoutExpired:
            return "closed its connection"

    def _listen(self) -> None:
        try:
            while True:
                number, word, what = self._wire.receive()
                with self._news:
                    self._answer = number, word, what
                    self.ready = word in ("loaded", "idle")
                    self.fresh = self.fresh and not self.ready
                    self._news.notify_all()
                if word in ("raised", "aborted"):
                    self._missed(number)
        except EOFError:
            pass
        except Exception:  # an error that was pickled there and cannot be made again here
            log.exception("rank %d said what cannot be read", self.rank)
            self.kill()
        with self._news:
            self.gone, self.ready = True, False
            self._news.notify_all()
        self._missed(None)


def wait(news: threading.Condition, done: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``done`` is true, but no longer; whether it is."""
    with news:
        return news.wait_for(done, timeout=seconds)
