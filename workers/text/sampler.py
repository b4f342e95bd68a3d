"""From a row of logits to a token.

A pure function of the row, the parameters and the tokens so far: nothing here knows the row's slot,
its neighbours or how often the request was resumed, and nothing is carried from token to token.
Everything runs in float64 on the host, and ties go to the lowest id. The order is fixed: bias,
penalties, ends (:func:`adjust`), temperature, ``top_k``, ``top_p``, noise (:func:`choose`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy
from numpy.typing import NDArray

from .noise import gumbel
from .parameters import Parameters

VERSION: Final = 1
"""To be raised with every change of the arithmetic here or in :mod:`.noise`.

It is part of the fingerprint: a request begun with one arithmetic is never continued with another.
"""

_LARGEST: Final = 1e308
_HEAD = 1024  # how many of the strongest tokens top_p sorts before it resorts to sorting all


def adjust(
    logits: NDArray[Any],
    parameters: Parameters,
    prompt: NDArray[Any],
    output: Sequence[int],
    ends: Collection[int] = (),
) -> NDArray[Any]:
    """The logits that bias and penalties leave, in float64; ``logits`` itself when there are none.

    ``prompt`` holds the ids of the prompt, in any order and number; ``output`` are the tokens
    generated so far; ``ends`` the tokens that end a text. For a token with the logit z that occurs n
    times in ``output``, in this order:

    1. ``z + bias``, its entry in ``logit_bias`` (as in the API reference of OpenAI's completions).
    2. ``z / r if z > 0 else z * r`` with ``repetition_penalty`` r, if it is in the prompt or in the
       output (Keskar et al., "CTRL", arXiv:1909.05858, section 4.1, which divides; the rule for the
       sign is that of ``RepetitionPenaltyLogitsProcessor`` in transformers).
    3. ``z - frequency_penalty * n - presence_penalty * (n > 0)``, from the left. The prompt does not
       count (OpenAI's guide to frequency and presence penalties).
    4. -∞, if it is one of ``ends`` and ``output`` is shorter than ``min_tokens``.

    A product beyond what float64 holds becomes the largest or the smallest number. Raises
    :class:`ArithmeticError` as :func:`choose` does.
    """
    repeats = parameters.repetition_penalty != 1
    counts = parameters.frequency_penalty != 0 or parameters.presence_penalty != 0
    early = len(output) < parameters.min_tokens and bool(ends)
    if not (repeats or counts or early or parameters.logit_bias):
        return logits
    _strongest(logits, len(output))
    values = logits.astype(numpy.float64)
    if parameters.logit_bias:
        values[[token for token, _ in parameters.logit_bias]] += [bias for _, bias in parameters.logit_bias]
    if repeats:
        ids = numpy.union1d(prompt, numpy.array(output, dtype=numpy.int64))
        found = values[ids]
        with numpy.errstate(over="ignore", under="ignore"):
            found = numpy.where(found > 0, found / parameters.repetition_penalty, found * parameters.repetition_penalty)
        values[ids] = numpy.clip(found, -_LARGEST, _LARGEST)
    if counts and output:
        ids, numbers = numpy.unique(numpy.array(output, dtype=numpy.int64), return_counts=True)
        values[ids] = values[ids] - parameters.frequency_penalty * numbers - parameters.presence_penalty
    if early:
        values[[token for token in ends if token < len(values)]] = -numpy.inf
    return values


def choose(logits: NDArray[Any], parameters: Parameters, index: int) -> int:
    """The token for the output at ``index`` (0 is the first).

    ``logits`` has one number for each token of the vocabulary, as :func:`adjust` left it. Raises
    :class:`ArithmeticError` when they are no numbers, which is the model's or the device's failure
    and not the request's.
    """
    best = _strongest(logits, index)
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


def score(logits: NDArray[Any], token: int, count: int) -> dict[str, Any]:
    """``{"logprob": …}`` of a token, and with a ``count`` ``"top_logprobs": [[token, logprob], …]``.

    Natural logarithms of the model's own distribution, softmax over ``logits`` as they came from the
    model: before bias, penalties, temperature, ``top_k`` and ``top_p``. In float64, not rounded, as
    ``(z - max) - log(Σ exp(z - max))`` with a running sum in the order of the ids. The ``count``
    likeliest tokens come likeliest first, of equal ones the lowest id; ``token`` need not be one.
    """
    values = logits.astype(numpy.float64)
    values -= values.max()
    values -= numpy.log(numpy.cumsum(numpy.exp(values))[-1])
    result: dict[str, Any] = {"logprob": float(values[token])}
    if count:
        top = strongest(values, count)
        top = top[numpy.argsort(-values[top], kind="stable")]
        result["top_logprobs"] = [[int(place), float(values[place])] for place in top]
    return result


def _strongest(logits: NDArray[Any], index: int) -> int:
    """The strongest token, the first of equal ones, of a row that has one."""
    best = int(numpy.argmax(logits))
    if not numpy.isfinite(logits[best]):
        raise ArithmeticError(f"the model's logits for output {index} are not finite")
    return best


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
