"""From a row of logits to a token.

A pure function of the row, the parameters and the output's index: nothing here knows the row's
slot, its neighbours or how often the request was resumed. Everything runs in float64 on the
host, and ties go to the lowest id.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from .noise import gumbel
from .parameters import Parameters

_HEAD = 1024  # how many of the strongest tokens top_p sorts before it resorts to sorting all


def choose(logits: NDArray[Any], parameters: Parameters, index: int) -> int:
    """The token for the output at ``index`` (0 is the first).

    ``logits`` has one number for each token of the vocabulary. Raises :class:`ArithmeticError` when
    they are no numbers, which is the model's or the device's failure and not the request's.
    """
    best = int(numpy.argmax(logits))
    if not numpy.isfinite(logits[best]):
        raise ArithmeticError(f"the model's logits for output {index} are not finite")
    if parameters.temperature == 0:
        return best
    # Subtracting the largest first keeps a tiny temperature from overflowing.
    with numpy.errstate(over="ignore"):
        values = (logits.astype(numpy.float64) - float(logits[best])) / parameters.temperature
    ids: NDArray[Any] = numpy.arange(len(values))
    if 0 < parameters.top_k < len(values):
        ids = strongest(values, parameters.top_k)
    if parameters.top_p < 1:
        ids = ids[nucleus(values[ids], parameters.top_p)]
    scores = values[ids] + gumbel(parameters.seed, index, ids)
    return int(ids[numpy.argmax(scores)])


def strongest(values: NDArray[numpy.float64], count: int) -> NDArray[Any]:
    """Places of the ``count`` largest values, in ascending order; of equal ones the first."""
    if count >= len(values):
        return numpy.arange(len(values))
    least = numpy.partition(values, len(values) - count)[len(values) - count]
    above = numpy.flatnonzero(values > least)
    equal = numpy.flatnonzero(values == least)[: count - len(above)]
    return numpy.sort(numpy.concatenate((above, equal)))


def nucleus(values: NDArray[numpy.float64], top_p: float) -> NDArray[Any]:
    """Places of the smallest set of values that holds ``top_p`` of the probability, in ascending order.

    ``values`` are log-probabilities up to a constant. Sums are running sums, in one order, and so
    have one rounding.
    """
    weights = numpy.exp(values)
    wanted = top_p * float(numpy.cumsum(weights)[-1])
    for size in (_HEAD, len(values)):
        head = strongest(values, size)
        order = head[numpy.argsort(-values[head], kind="stable")]
        count = int(numpy.searchsorted(numpy.cumsum(weights[order]), wanted)) + 1
        if count <= len(order):
            return numpy.sort(order[:count])
    return numpy.arange(len(values))
