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

from .membership import RankReport, ending
from .wire import Wire

log: Final = logging.getLogger("rq.worker")

LINGER: Final = 1.0
"""Seconds that a rank has to say how it came out of a step that another one has left."""

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

    def raise_from(self, number: int) -> None:
        """Raise what it raised when it did what the order of this number says."""
        match self.answer(number):
            case "raised", error:
                raise error

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


class Followers:
    """All of them. An order goes to each, and an epoch needs each.

    ``interrupt`` lets the leader out of a collective in which somebody is missing.
    """

    def __init__(self, hello: Mapping[str, Any], environment: Mapping[str, str], interrupt: Callable[[], None]) -> None:
        self.everyone: dict[int, Follower] = {}
        """By rank, from 1."""
        self._hello = hello
        self._environment = environment
        self._interrupt = interrupt
        self._news = threading.Condition()
        self._number = 0
        """Of the last order."""
        self._stepping = False
        """The leader is inside the step of that order."""

    def start(self, rank: int) -> None:
        """Start one, in the place of the one before. Main thread only."""
        if (old := self.everyone.get(rank)) is not None:
            old.close()
        self.everyone[rank] = Follower(rank, self._hello, self._environment, self._news, self._missed)

    def order(self, *order: Any) -> None:
        """Give an order to all."""
        self._number += 1
        for follower in self.everyone.values():
            follower.send((self._number, *order))

    def order_anew(self, *order: Any) -> None:
        """Give an order after which each has to say again that it is ready."""
        for follower in self.everyone.values():
            follower.ready = False
        self.order(*order)

    def step(self, changes: list[tuple[str, Any]]) -> bool:
        """Have all step, and say that the leader does; False if that would be without one that is gone."""
        self.order("step", changes)
        with self._news:
            self._stepping = True
            return not any(item.gone for item in self.everyone.values())

    def stepped(self) -> None:
        """The leader is out of the step."""
        with self._news:
            self._stepping = False
            self._news.notify_all()

    def reports(self, seconds: float) -> tuple[dict[int, RankReport | None], dict[int, str]]:
        """How each came out of the step, waited for (``None``: it says nothing), and how those ended that are gone."""
        number = self.wait_answers(seconds)
        reports: dict[int, RankReport | None] = {}
        gone = {}
        for rank, follower in self.everyone.items():
            match follower.answer(number):
                case "stepped", value:
                    reports[rank] = RankReport(digest=value)
                case "raised", error:
                    reports[rank] = RankReport(error=error)
                case "aborted", what:
                    reports[rank] = RankReport(broken=what)
                case _:
                    reports[rank] = None
                    if follower.gone and not follower.killed:
                        gone[rank] = follower.fate()
        return reports, gone

    def wait_answers(self, seconds: float) -> int:
        """Wait until all have answered the last order, or never will; its number."""
        number = self._number
        self._wait(lambda: all(item.settled(number) for item in self.everyone.values()), seconds)
        return number

    def settled(self, seconds: float) -> bool:
        """Whether each can be told to come, or will never be able to, within so many seconds."""
        return self._wait(
            lambda: all(item.gone or item.ready or item.said(0, "raised") for item in self.everyone.values()), seconds
        )

    def pids(self) -> str:
        """For people."""
        return ", ".join(f"rank {rank} is pid {item.process.pid}" for rank, item in self.everyone.items())

    def close(self) -> None:
        """End all."""
        for follower in self.everyone.values():
            follower.close()
        self.everyone.clear()

    def _missed(self, number: int | None) -> None:
        """A follower will not come to the collectives of the running step: let the leader out of them.

        gloo notices a closed connection by itself, NCCL nothing. A rank that raised keeps its connections: the others
        may be about to raise the same. So it is asked to close them after a while, and at last made to. Called by a
        follower's thread: it did badly in the step of this number, or ``None``, is gone. One that hangs is left to the
        timeout.
        """
        number = self._number if number is None else number

        def over() -> bool:
            return not self._stepping or self._number != number

        if self._wait(over, LINGER):
            return
        self._interrupt()
        for follower in list(self.everyone.values()):
            follower.send((number, "let go"))
        if not self._wait(over, LINGER):
            for follower in list(self.everyone.values()):
                follower.kill()

    def _wait(self, done: Callable[[], bool], seconds: float) -> bool:
        with self._news:
            return self._news.wait_for(done, timeout=seconds)
