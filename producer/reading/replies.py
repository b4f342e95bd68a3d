"""Replies: hints that something is to be read, heard by one thread for a whole client.

Workers publish a line when a request has new outputs or has ended. Such a line may get lost, and nothing
depends on it: a waiter that hears nothing reads the keys by itself after a while. Hints only make it quick,
and one subscription serves ten thousand waiters.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import redis

from ...protocol.keys import key
from ...protocol.reading.output_log import LogPage, LogPlace
from .subscription import MOST, PING_AFTER, Hint, Subscription
from .watches import ReplyWatch

SLICE: Final = 1.0
"""Seconds that the listener reads at a time; after that it looks what has changed around it."""

LISTEN_IDLE: Final = 60.0
"""Seconds without any waiter after which the listener ends and gives its connection back."""

CONFIRM: Final = 1.0
"""Seconds that a waiter gives the subscription before it goes on without."""

_WAKE = b"wake"


class Replies:
    """The listener of one client: a thread and a connection, from the first wait until nobody waits.

    Only that thread touches the subscription. Others say what they want to hear and wake it with a message to
    the client's own channel.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        client_id: str,
        publish: Callable[[str, bytes], object],
        look: Callable[[Sequence[tuple[str, LogPlace]]], Sequence[LogPage]],
    ) -> None:
        """``connect`` makes a client for the listener alone; ``publish`` sends to a channel, and ``look`` reads pages
        of logs, or gives none. Both raise nothing.
        """
        self._connect = connect
        self._publish = publish
        self._look = look
        self.own = client_id
        """The channel on which this client hears of what it has submitted itself."""
        self._closed = False
        self.reset()

    def reset(self) -> None:
        """Begin anew, also in a forked child: the listener stayed in the parent, perhaps with a lock held."""
        self._changed = threading.Condition()
        # Weak: an interest whose waiter an exception has ended between two instructions ends by itself.
        self._watches: dict[str, weakref.WeakSet[ReplyWatch]] = {}
        self._wanted: dict[str, weakref.WeakSet[ReplyWatch]] = {}
        # What the listener is to change: there may be ten thousand channels, and it looks at each change alone.
        self._join: set[str] = set()
        self._leave: set[str] = set()
        self._told = False
        self._renewed = False
        self._heard: set[str] = set()
        self._deaf = False
        self._idle_since = self._tidied = time.monotonic()
        self._thread: threading.Thread | None = None

    def watch(self, identifier: str, channel: str, *, outputs: bool = False) -> ReplyWatch:
        """Hear of a request whose producer is ``channel``; returns once subscribed, or when that takes too long.

        Read the keys after this: what happened before it is not told. ``outputs`` as for :class:`ReplyWatch`.
        """
        watch = ReplyWatch(self, identifier, channel, outputs=outputs)
        try:
            if self.register(watch):
                self.tell()
            if watch.channels and not watch.listens:
                with self._changed:
                    self._changed.wait_for(lambda: watch.listens or self._deaf or self._closed, CONFIRM)
        except BaseException:  # Ctrl-C
            self.forget(watch)
            raise
        return watch

    def hear(self, identifier: str) -> ReplyWatch | None:
        """:meth:`watch` on the client's own channel; ``None`` if that is not listened to yet."""
        if not self.hears(self.own):
            return None
        watch = ReplyWatch(self, identifier, self.own)
        self.register(watch)
        return watch

    def register(self, watch: ReplyWatch) -> bool:
        """Take up an interest without waiting for anything; if it returns True, :meth:`tell` has to be called.

        Once subscribed, :meth:`ReplyWatch.subscribed` is called, unless it is heard already: read the keys then.
        """
        if not watch.channels:
            return False  # put there by somebody who listens to nothing
        with self._changed:
            self._watches.setdefault(watch.identifier, weakref.WeakSet()).add(watch)
            for channel in watch.channels:
                if channel not in self._wanted:
                    self._wanted[channel] = weakref.WeakSet()
                    self._leave.discard(channel)
                    if channel not in self._heard:
                        self._join.add(channel)
                self._wanted[channel].add(watch)
            running = self._thread is not None and self._thread.is_alive()
            if not running and not self._closed:
                self._deaf = False
                self._thread = threading.Thread(target=self._run, name="perdure-replies", daemon=True)
                self._thread.start()
            # Who is the first to want something new tells the listener; one that is just starting sees it by itself.
            tells, self._told = running and bool(self._join) and not self._told, bool(self._join)
            return tells

    def forget(self, watch: ReplyWatch) -> None:
        """End an interest. The channel is left when the listener next looks around."""
        with self._changed:
            # Harmless when repeated, and after half a registration.
            _discard(self._watches, watch.identifier, watch)
            for channel in watch.channels:
                if _discard(self._wanted, channel, watch):
                    self._abandon(channel)
            if not self._watches:
                self._idle_since = time.monotonic()

    @property
    def waiters(self) -> int:
        """Requests of which somebody wants to hear."""
        return len(self._watches)

    def hears(self, channel: str) -> bool:
        """Whether hints of this producer arrive now, as far as anybody can know."""
        return channel in self._heard

    def renew(self) -> None:
        """Have the listener connect anew: the server may be the primary no more."""
        self._renewed = True

    def close(self) -> None:
        """End the listener and wake all waiters."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._wake_waiters()
            self._changed.notify_all()
        # One that Ctrl-C kept from starting is not alive, and cannot be joined.
        if thread is not None and thread.is_alive():
            self.tell()
            thread.join(2 * SLICE)

    # --- the listener ----------------------------------------------------------------------------

    def _run(self) -> None:
        tries = 0
        while True:
            began = time.monotonic()
            self._renewed = False
            try:
                with Subscription(self._connect()) as subscription:
                    self._listen(subscription)
                return
            except (redis.RedisError, OSError):
                tries = 0 if time.monotonic() - began > PING_AFTER else tries + 1
            with self._changed:
                self._heard = set()
                self._deaf = True
                self._wake_waiters()  # what was published meanwhile is lost: they look now
                self._changed.notify_all()
                self._changed.wait_for(self._finished, random.uniform(0, min(1.0, 0.05 * 2 ** min(tries, 16))))
                if self._finished():
                    self._thread = None
                    return

    def _listen(self, subscription: Subscription) -> None:
        """Serve until nobody waits any more. Raises what redis-py raises when the connection breaks."""
        with self._changed:
            self._join, self._leave = {self.own, *self._wanted}, set()
        while True:
            with self._changed:
                self._forget_lost()
                if self._finished():
                    self._thread, self._heard = None, set()
                    return
                join, leave = [*islice(self._join, MOST)], [*islice(self._leave, MOST)]
                self._join.difference_update(join)
                self._leave.difference_update(leave)
                self._heard.difference_update(leave)
                self._told = bool(self._join)
            subscription.change(join, leave)
            # What is still to be changed does not wait for a message.
            hints = subscription.hints(0.0 if self._join or self._leave else SLICE)
            if self._renewed:
                raise redis.ConnectionError("another server may be the primary by now")
            self._take(hints)

    def _take(self, hints: Sequence[Hint]) -> None:
        woken: dict[ReplyWatch, bytes] = {}
        with self._changed:
            for hint in hints:
                if hint.channel:
                    self._confirm(hint.channel)
                for watch in self._watches.get(hint.request, ()):
                    if watch not in woken or not hint.what.isdigit():
                        woken[watch] = hint.what
        # All that have news in one round trip, before their waiters are woken: each would only ask for it.
        places = {watch: place for watch in woken if (place := watch.ahead()) is not None}
        pages = self._look([(watch.identifier, place) for watch, place in places.items()]) if places else ()
        read = dict(zip(places, pages, strict=False))
        for watch, what in woken.items():
            watch.wake(what, places.get(watch), read.get(watch))

    def _confirm(self, channel: str) -> None:
        """What is published on it is heard from now on (lock held)."""
        self._heard.add(channel)
        for watch in self._wanted.get(channel, ()):
            if watch.listens:
                watch.subscribed()
        if self._deaf:
            self._deaf = False
            self._wake_waiters()  # they may have read just before this, and missed what came between
        self._changed.notify_all()

    def _finished(self) -> bool:
        return self._closed or (not self._watches and time.monotonic() - self._idle_since > LISTEN_IDLE)

    def _wake_waiters(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.wake()

    def tell(self) -> None:
        """Have the listener look around now. If that fails, it does so by itself within a slice."""
        self._publish(key("replies", self.own), _WAKE)

    def _forget_lost(self) -> None:
        """Leave what nobody waits for any more without having said so (lock held)."""
        now = time.monotonic()
        if now - self._tidied < PING_AFTER:
            return
        self._tidied = now
        for sets in (self._watches, self._wanted):
            for name in [name for name, watches in sets.items() if not len(watches)]:
                del sets[name]
                if sets is self._wanted:
                    self._abandon(name)

    def _abandon(self, channel: str) -> None:
        """Nobody wants it any more (lock held). The listener leaves it when it next looks around."""
        self._join.discard(channel)
        if channel != self.own:
            self._leave.add(channel)


def _discard(sets: dict[str, weakref.WeakSet[ReplyWatch]], name: str, watch: ReplyWatch) -> bool:
    """True if that was the last."""
    watches = sets.get(name)
    if watches is None:
        return False
    watches.discard(watch)
    if len(watches):
        return False
    del sets[name]
    return True
