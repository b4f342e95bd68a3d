"""When a failed request is tried again.

The server decides (``backoff`` in ``protocol/lua/prelude.lua``); this is the same computation, so that
a schedule can be shown before it happens. The jitter is a hash of request and number, not a random:
asked twice, the answer is the same.
"""

from __future__ import annotations

_ROUNDS = bytes(3)  # carry the last characters, in which neighbours differ, into the high bits


def backoff(request_id: str, n: int, base: float, cap: float) -> float:
    """Seconds before retry number ``n`` (1 is the first) of a request.

    ``base`` (seconds) doubles with every further retry, up to ``cap`` (seconds); then up to a quarter is taken
    off, so that requests which failed together do not come back together. Raises ``ValueError`` for ``n`` below 1.
    """
    if n < 1:
        raise ValueError(f"the first retry is number 1, not {n}")
    delay = min(cap, base * 2.0 ** min(n - 1, 30))
    spread = 0
    for byte in f"{request_id}:{n}".encode() + _ROUNDS:
        spread = ((spread + byte) * 1664525 + 1013904223) % 2**32
    return delay * (1 - 0.25 * spread / 2**32)


def schedule(request_id: str, retries: int, base: float, cap: float) -> list[float]:
    """The delays in seconds before each of ``retries`` retries, the first one first."""
    return [backoff(request_id, n, base, cap) for n in range(1, retries + 1)]
