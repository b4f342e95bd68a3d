"""How far a batch is, and how fast: what the progress and the summary show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

SPAN: Final = 30.0
"""Seconds over which speed is measured: answers come in bursts, and a pool's size changes."""


@dataclass(slots=True)
class Tally:
    """Counts of lines. ``kept`` and ``failed_before`` are those that earlier runs have left."""

    lines: int
    kept: int = 0
    failed_before: int = 0
    answered: int = 0
    failed: int = 0
    found: int = 0
    """Requests that were there already: of a run that was ended, or of the same file elsewhere."""
    resumes: int = 0
    """Executions of these requests beyond their first: each went on where another had stopped."""
    prompt_tokens: int = 0
    tokens: int = 0
    in_flight: int = 0
    waiting_for: str = ""
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    @property
    def ended(self) -> int:
        """Lines that are on disk, of this run and of those before."""
        return self.kept + self.failed_before + self.answered + self.failed

    @property
    def failures(self) -> int:
        return self.failed + self.failed_before

    def sample(self, now: float) -> None:
        """Take note of the counts at this moment (monotonic seconds)."""
        self._samples.append((now, self.answered + self.failed, self.tokens))
        while now - self._samples[0][0] > SPAN and len(self._samples) > 2:
            self._samples.popleft()

    def speed(self) -> tuple[float, float]:
        """Lines and tokens a second, lately; zeros while nobody can tell."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (begin, lines, tokens), (end, more_lines, more_tokens) = self._samples[0], self._samples[-1]
        span = end - begin
        return ((more_lines - lines) / span, (more_tokens - tokens) / span) if span > 0 else (0.0, 0.0)

    def left(self) -> float | None:
        """Seconds to the end at this speed; ``None`` while nobody can tell."""
        speed, _ = self.speed()
        return (self.lines - self.ended) / speed if speed > 0 else None

    def summary(self, seconds: float) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "answered": self.kept + self.answered,
            "failed": self.failures,
            "kept": self.kept + self.failed_before,
            "found": self.found,
            "resumes": self.resumes,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 1) if seconds > 0 else 0.0,
        }
