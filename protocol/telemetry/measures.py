"""Measures: what workers time and count, and how it stands in the counters of the pool.

A histogram is one field per bucket that was ever hit, ``bucket:<measure>:<bound>:<labels>``, and one for the sum,
``sum:<measure>:<labels>``; a count is ``<event>:<labels>``. Labels are joined by colons, the queue first: it is the
only one that may hold a colon itself. All values are whole numbers; a sum is in units of ``1 / scale``.

Workers collect in memory (:class:`Meter`) and add to Redis once per heartbeat (``measure.lua``), so that the
counters outlive the worker and no request costs a round trip.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

_LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_EACH = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_PAUSE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 60, 120, 300, 3600)
_BYTES = tuple(4**power for power in range(3, 14))  # 64 bytes to 64 MiB


@dataclass(frozen=True, slots=True)
class Measure:
    """One histogram: its upper bounds, its labels, and how many units of its sum make one."""

    bounds: tuple[float, ...]
    labels: tuple[str, ...] = ("queue",)
    scale: int = 1_000_000

    @property
    def texts(self) -> tuple[str, ...]:
        """The bounds as the fields have them, the last one ``inf``."""
        return (*(f"{bound:g}" if bound < 1000 else f"{bound:.0f}" for bound in self.bounds), "inf")


MEASURES: Final[Mapping[str, Measure]] = {
    # Buckets of the four latencies are vLLM's, so that its users can lay one over the other.
    "queue_time": Measure(_LONG),
    "time_to_first_token": Measure(_FIRST),
    "time_per_output_token": Measure(_EACH),
    "e2e_request_latency": Measure(_LONG),
    "recovery": Measure(_PAUSE, ("queue", "reason")),
    "checkpoint": Measure(_SHORT, ()),
    "checkpoint_interval": Measure(_EACH, ()),
    "checkpoint_bytes": Measure(_BYTES, scale=1),
}
"""Every histogram, by its name without prefix and unit."""

COUNTS: Final[Mapping[str, tuple[str, ...]]] = {
    "checkpoints": ("queue",),
    "outputs": ("queue",),
    "renewals": (),
}
"""What workers count besides, with its labels."""

_TEXTS = {name: measure.texts for name, measure in MEASURES.items()}


@dataclass(slots=True)
class Meter:
    """Collects what one worker measures. For one thread.

    What was sent and not answered is kept as it is, with its number and the incarnation it was sent for: only a
    verbatim second sending is recognised as such.
    """

    _buckets: Counter[tuple[str, int, tuple[str, ...]]] = field(default_factory=Counter)
    _sums: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    _counts: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    _flight: tuple[str, int, dict[str, int], tuple[float, float]] | None = None
    _number: int = 0
    _shown: tuple[float, float] = (0.0, 0.0)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Enter one value of a histogram."""
        measure = MEASURES[name]
        self._buckets[name, bisect_left(measure.bounds, value), labels] += 1
        self._sums[name, labels] += round(value * measure.scale)

    def count(self, event: str, by: int, *labels: str) -> None:
        """Count ``by`` more of an event."""
        self._counts[event, labels] += by

    def flush(
        self, incarnation: str, send: Callable[[str, int, dict[str, int], float, float], object], *intervals: float
    ) -> None:
        """Send what has come, if anything has, with the two ``intervals`` of ``Store.measure``.

        Raises what ``send`` raises; then it is sent again the next time.
        """
        if self._flight is None:
            counts = self._take()
            if not counts and intervals == self._shown:
                return
            self._number += 1
            now, usual = intervals
            self._flight = (incarnation, self._number, counts, (now, usual))
        name, number, sent, self._shown = self._flight
        send(name, number, sent, *self._shown)
        self._flight = None

    def _take(self) -> dict[str, int]:
        fields: dict[str, int] = {}
        for (name, place, labels), number in self._buckets.items():
            fields[":".join(("bucket", name, _TEXTS[name][place], *labels))] = number
        for (name, labels), total in self._sums.items():
            fields[":".join(("sum", name, *labels))] = total
        for (event, labels), number in self._counts.items():
            fields[":".join((event, *labels))] = number
        self._buckets.clear()
        self._sums.clear()
        self._counts.clear()
        return fields


def parse_counters(raw: Mapping[bytes, bytes]) -> dict[str, int]:
    """Field -> number, of all fields that hold one."""
    found = {}
    for name, value in raw.items():
        try:
            found[name.decode()] = int(value)
        except ValueError:
            pass  # nobody of ours wrote it
    return found


@dataclass(slots=True)
class Histogram:
    """One histogram as it was read: hits of each bucket, in the order of the measure's ``texts``, and the sum."""

    hits: list[int]
    total: float = 0.0


def histograms(counters: Mapping[str, int]) -> dict[str, dict[tuple[str, ...], Histogram]]:
    """All histograms in the counters: measure -> labels -> histogram.

    A bucket of a release with other bounds counts in the next larger one of this.
    """
    result: dict[str, dict[tuple[str, ...], Histogram]] = {name: {} for name in MEASURES}
    for field_name, number in counters.items():
        kind, _, rest = field_name.partition(":")
        if kind not in ("bucket", "sum"):
            continue
        name, _, rest = rest.partition(":")
        bound = ""
        if kind == "bucket":
            bound, _, rest = rest.partition(":")
        measure = MEASURES.get(name)
        if measure is None:
            continue
        labels = split_labels(rest, len(measure.labels))
        place = _place(measure, bound) if kind == "bucket" else 0
        if labels is None or place is None:
            continue
        entry = result[name].setdefault(labels, Histogram([0] * (len(measure.bounds) + 1)))
        if kind == "sum":
            entry.total = number / measure.scale
        else:
            entry.hits[place] += number
    return result


def counts(counters: Mapping[str, int], event: str, number: int) -> dict[tuple[str, ...], int]:
    """All counts of an event with so many labels."""
    found = {}
    for name, value in counters.items():
        head, _, rest = name.partition(":")
        if head == event and (labels := split_labels(rest, number)) is not None:
            found[labels] = value
    return found


def split_labels(text: str, number: int) -> tuple[str, ...] | None:
    """So many labels out of what stands after the event; ``None`` if there are not so many."""
    if number == 0:
        return () if not text else None
    labels = tuple(text.rsplit(":", number - 1))
    return labels if len(labels) == number and all(labels) else None


def _place(measure: Measure, bound: str) -> int | None:
    try:
        return bisect_left(measure.bounds, float(bound))
    except ValueError:
        return None
