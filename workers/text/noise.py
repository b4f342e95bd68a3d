"""Noise without a state: a hash of where it is used.

A generator that is advanced draw by draw must be saved with every checkpoint, and is disturbed by
whoever else draws from it. A hash of (seed, position, token) needs neither: any process that
knows the request knows its noise. Integer arithmetic, so that it is equal on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_MASK: Final = 2**64 - 1

# As int32, whose products and sums wrap around. The multipliers are those of "lowbias32", found by Chris Wellons'
# search for 32-bit hashes whose every output bit depends on every input bit.
_STEP: Final = 0x9E3779B9 - 2**32
_THIRD: Final = 0x7FEB352D
_FOURTH: Final = 0x846CA68B - 2**32


def uniform(seed: int, position: int, ids: NDArray[Any]) -> NDArray[numpy.float64]:
    """One number for each id, strictly between 0 and 1: 64 bits, for weights that are made and checks.

    ``seed`` and ``position`` are integers of at most 64 bits; ``ids`` is an array of integers.
    """
    # Arrays of unsigned integers wrap around without a warning; that is the arithmetic wanted here.
    words = ids.astype(numpy.uint64) * numpy.uint64(_GOLDEN) + numpy.uint64(_key(seed, position))
    for _ in range(2):
        words ^= words >> numpy.uint64(30)
        words *= numpy.uint64(_FIRST)
        words ^= words >> numpy.uint64(27)
        words *= numpy.uint64(_SECOND)
        words ^= words >> numpy.uint64(31)
    # 52 bits and a half step: with 53 the largest would round to 1, whose logarithm is 0.
    return ((words >> numpy.uint64(12)).astype(numpy.float64) + 0.5) * 2.0**-52


def exponential(places: Sequence[tuple[int, int]], size: int, device: torch.device) -> Tensor:
    """Draws from the exponential distribution for each (seed, position), one for each id: float32 [places, size].

    Of weights that are divided by them the largest is a draw from the weights' distribution (the exponential race, the
    same as adding Gumbel noise to logarithms). 32 bits an id: what decides is the smallest of them, down to 2**-32.
    """
    return -torch.log1p(-fraction(places, size, device))


def fraction(places: Sequence[tuple[int, int]], size: int, device: torch.device) -> Tensor:
    """Numbers between 2**-32 and 1 - 2**-24: float32 [places, size]."""
    keys = torch.tensor([[_signed(_key(*place)), _signed(_key(*place) >> 32)] for place in places], dtype=torch.int32)
    low, high = keys.to(device).split(1, dim=1)
    words = _steps(size, device) + low
    words ^= _shifted(words, 16)
    words *= _THIRD
    words += high
    words ^= _shifted(words, 15)
    words *= _FOURTH
    words ^= _shifted(words, 16)
    # The half keeps the smallest above 0; the largest would round to 1, whose logarithm is infinite.
    return _shifted(words, 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """int32 moved to the right as if it had no sign."""
    return (words >> bits).bitwise_and_(2 ** (32 - bits) - 1)


@lru_cache(maxsize=4)
def _steps(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.int32, device=device) * _STEP


def _key(seed: int, position: int) -> int:
    return _mixed(_mixed(seed + _GOLDEN) ^ _mixed(position + _FIRST))


def _signed(word: int) -> int:
    word &= 2**32 - 1
    return word - 2**32 if word >= 2**31 else word


def _mixed(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)
