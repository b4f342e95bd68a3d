"""Reading an output log: each output once and in order, also when the request began again.

The log is a list of entries ``(epoch, offset, outputs)``. It only grows, until the request restarts from
zero: then it is deleted, and one of the next epoch begins. Or its Redis forgets the last second of it: see
:mod:`~perdure.protocol.reading.output_log`. The reader knows nothing of Redis: it is fed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

import msgpack

from ...protocol.errors import OutputsLost, OutputsRestarted, PerdureError
from ...protocol.reading.output_log import LogPage, LogPlace

_DIGEST: Final = 16
"""Bytes kept of every output that was read, to compare it when it comes again."""


class OutputReader:
    """Turns entries of the log into outputs that the caller does not have yet.

    ``start``: outputs at the beginning that the caller has already. ``restarts``: go on with the new outputs,
    from the first, when they differ from those that were given out.
    """

    def __init__(self, request_id: str, *, start: int = 0, restarts: bool = False) -> None:
        self.entry = 0
        """Where in the log to read next."""
        self._id = request_id
        self._start = start
        self._restarts = restarts
        self._epoch = -1
        self._position = 0
        self._digests = bytearray()
        self._place = LogPlace()
        self._known: int | None = None
        """The epoch of what Redis has lost, until one of a later epoch shows that the request began again since."""

    @property
    def place(self) -> LogPlace:
        """Where in the log to read the next page."""
        return self._place if self._place.entry == self.entry else LogPlace(self.entry)

    @property
    def count(self) -> int:
        """Outputs known to the caller, the skipped ones included."""
        return max(self._start, len(self._digests) // _DIGEST)

    def notice(self, epoch: int) -> bool:
        """Take note of the request's epoch; True if it is a new one, whose log has to be read from its start."""
        if epoch <= self._epoch:
            return False
        self._begin(epoch)
        if self._known is not None and epoch > self._known:
            self._known = None
        return True

    def compare(self, epoch: int) -> bool:
        """Compare with the epoch that the request's record has now. It grows; True if it was set back, as Redis has
        lost data: then the log has to be read from its start.
        """
        if epoch >= self._epoch:
            return False
        self._lose()
        self._epoch = epoch
        return True

    def take(self, page: LogPage) -> list[Any]:
        """:meth:`feed` for a page that was read at :attr:`place`; of a lost one nothing is new; all is read again."""
        if page.lost:
            self._lose()
            return []
        fresh = self.feed(page.entries)
        if self.entry == page.next.entry:
            self._place = page.next
        return fresh

    def _begin(self, epoch: int) -> None:
        self._epoch, self.entry, self._position, self._place = epoch, 0, 0, LogPlace()

    def _lose(self) -> None:
        """What was read is not what the log has: read it from its beginning, and compare."""
        self._known = max(self._epoch, self._known or 0)
        self._begin(-1)

    def feed(self, entries: Iterable[tuple[int, int, list[Any]]]) -> list[Any]:
        """Take entries that were read at :attr:`entry`; return what is new to the caller.

        Read again at :attr:`entry` afterwards, until there is none. Raises :class:`OutputsRestarted` when
        outputs that the caller has came out differently (and ``restarts`` is off).
        """
        fresh: list[Any] = []
        for epoch, offset, outputs in entries:
            # A newer log, of which this page may show the middle.
            middle = self.entry > 0
            if self.notice(epoch) and middle:
                break
            self.entry += 1
            if epoch < self._epoch:
                continue
            if offset > self._position:
                raise PerdureError(
                    f"the output log of request {self._id} lacks outputs {self._position} to {offset - 1}; "
                    "has its Redis lost data?"
                )
            for output in outputs[self._position - offset :]:
                if not self._compare(output, fresh):
                    return fresh
        return fresh

    def complete(self) -> bool:
        """To be asked when the request has finished and the log is read; False: read again from :attr:`entry`.

        A new epoch may put out less than the old one did. Raises :class:`OutputsRestarted` then, as above.
        """
        if self._position * _DIGEST >= len(self._digests):
            return True
        self._diverge()
        return False

    def _compare(self, output: Any, fresh: list[Any]) -> bool:
        """Take the output at the current position; False if the reading has to begin anew."""
        digest = hashlib.blake2b(msgpack.packb(output, use_bin_type=True), digest_size=_DIGEST).digest()
        place = self._position * _DIGEST
        if place < len(self._digests):
            if self._digests[place : place + _DIGEST] != digest:
                self._diverge()
                return False
        else:
            self._digests += digest
            if self._position >= self._start:
                fresh.append(output)
        self._position += 1
        return True

    def _diverge(self) -> None:
        if not self._restarts:
            raise (OutputsRestarted if self._known is None else OutputsLost)(self._id, self.count)
        self._digests.clear()
        self._start = self._position = self.entry = 0
        self._place = LogPlace()
