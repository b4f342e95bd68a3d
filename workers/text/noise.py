"""Noise without a state: a hash of where it is used.

A generator that is advanced draw by draw must be saved with every checkpoint, and is disturbed by
whoever else draws from it. A hash of (seed, position, token) needs neither: any process that
knows the request knows its noise. Integer arithmetic only, so it is equal on every machine.
"""

from __future__ import annotations

from typing import Any, Final

import numpy
from numpy.typing import NDArray

_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_MASK: Final = 2**64 - 1


def uniform(seed: int, position: int, ids: NDArray[Any]) -> NDArray[numpy.float64]:
    """One number for each id, strictly between 0 and 1.

    ``seed`` and ``position`` are integers of at most 64 bits; ``ids`` is an array of integers.
    """
    key = _mixed(_mixed(seed + _GOLDEN) ^ _mixed(position + _FIRST))
    # Arrays of unsigned integers wrap around without a warning; that is the arithmetic wanted here.
    words = ids.astype(numpy.uint64) * numpy.uint64(_GOLDEN) + numpy.uint64(key)
    for _ in range(2):
        words ^= words >> numpy.uint64(30)
        words *= numpy.uint64(_FIRST)
        words ^= words >> numpy.uint64(27)
        words *= numpy.uint64(_SECOND)
        words ^= words >> numpy.uint64(31)
    # 52 bits and a half step: with 53 the largest would round to 1, whose logarithm is 0.
    return ((words >> numpy.uint64(12)).astype(numpy.float64) + 0.5) * 2.0**-52


def gumbel(seed: int, position: int, ids: NDArray[Any]) -> NDArray[numpy.float64]:
    """Gumbel noise for each id: the argmax of log-probability plus this is a draw from the distribution."""
    result: NDArray[numpy.float64] = -numpy.log(-numpy.log(uniform(seed, position, ids)))
    return result


def _mixed(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)
