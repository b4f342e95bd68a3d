"""Limits that producers, workers and scripts share. Whoever keeps to them needs nothing of Redis to know them."""

from __future__ import annotations

from typing import Final

# Of one call: a longer one would keep every other client of Redis waiting.
MAX_REQUESTS: Final = 128
MAX_BYTES: Final = 8 * 1024 * 1024

LONGEST_DELAY: Final = 30.0
"""Seconds to which the delay of a request grows that is released again and again."""
