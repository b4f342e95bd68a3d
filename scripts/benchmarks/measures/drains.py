"""How fast a full queue is emptied: samples while workers run, and the rate between two of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import redis

from ..processes import BenchmarkFailed, BenchProcess
from ..stage import ServerSample, Stage

INTERVAL: Final = 0.02
"""Seconds between two samples; each costs the server about 0.1 ms."""

BEGIN: Final = 0.25
"""The part of the requests that is not timed: until all workers have started."""

SLACK: Final = 6
SETTLED: Final = 1.0
"""So few may be missing after so many seconds of stillness; all results are read back in any case."""

BOOT: Final = 60.0
STILL: Final = 20.0
"""Seconds without any end after which the measurement has failed: before the first, and after it."""


@dataclass(frozen=True, slots=True)
class DrainFigures:
    """Figures of one drain. ``done`` are all that ended; the rest is per request of the timed part."""

    done: int
    rate: float
    cpu_us: float
    round_trips: float


def watch(
    stage: Stage,
    count: Callable[[redis.Redis], int],
    submitted: int,
    limit: float,
    workers: Sequence[BenchProcess],
) -> list[ServerSample]:
    """Sample until all have ended, or for ``limit`` seconds after the first has. Raises :class:`BenchmarkFailed`."""
    samples = [stage.sample(count)]
    began = moved = time.monotonic()
    first: float | None = None
    while samples[-1].done < submitted:
        time.sleep(INTERVAL)
        samples.append(stage.sample(count))
        now = samples[-1].at
        if samples[-1].done > samples[-2].done:
            moved = now
            first = first or now
        if first is not None and now - first > limit:
            break
        # Some keep no exact count, but one that is off by the few keys of their own.
        if submitted - samples[-1].done <= SLACK and now - moved > SETTLED:
            break
        stopped = [worker for worker in workers if not worker.running]
        if stopped or now - moved > (STILL if first else BOOT):
            what = "a worker has ended" if stopped else f"nothing has ended for {now - moved:.0f} s"
            raise BenchmarkFailed(
                f"{what}; {samples[-1].done} of {submitted} are done after {now - began:.0f} s\n"
                + "\n".join(worker.tail() for worker in workers)
            )
    return samples


def judge(samples: Sequence[ServerSample]) -> DrainFigures:
    """The rate between the first quarter and the end; the samples' own calls are taken off the round trips."""
    last = samples[-1]
    first = next((place for place, sample in enumerate(samples) if sample.done >= BEGIN * last.done), 0)
    # The last sample may come some time after the last end: the first that has seen it counts.
    end = next(place for place, sample in enumerate(samples) if sample.done == last.done)
    if end <= first:
        raise BenchmarkFailed(f"all {last.done} ended between two samples; take more requests")
    begin, until = samples[first], samples[end]
    number = until.done - begin.done
    own = 2 * (end - first)
    return DrainFigures(
        last.done,
        number / (until.at - begin.at),
        (until.cpu - begin.cpu) / number * 1e6,
        max(0.0, (until.reads - begin.reads - own) / number),
    )
