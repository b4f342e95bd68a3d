"""From rows of logits to tokens: the same function for every engine that lets us sample.

What is chosen for a row is a function of its logits, its parameters and the tokens so far: nothing here knows the row's
slot, its neighbours or how often the request was resumed, and nothing is carried from token to token but sums of what
the tokens say. So a resume needs no random state. The order is fixed: bias, penalties, ends, grammar, temperature,
``min_p``, ``top_k``, ``top_p``, noise. In float32, and ties go to the lowest id.

No sum of fractions is taken, whose last bits could depend on the batch or the run: ``top_p`` adds integers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from .noise import exponential
from .parameters import Parameters

VERSION: Final = 2
"""To be raised with every change of the arithmetic here or in :mod:`.noise`.

It is part of the fingerprint: a request begun with one arithmetic is never continued with another.
"""

_LARGEST: Final = 3.0e38
_LEAST: Final = 1e-30
_MOST: Final = 1e30
"""What a temperature and a penalty are at least and at most: beyond it float32 has 0 and infinity."""

_HEAD: Final = 1024  # how many of the strongest tokens top_p sorts before it resorts to sorting all
_WHOLE: Final = 2.0**40
"""What the largest weight counts in ``top_p``: a sum of a million of them fits into 64 bits."""


class Grammar(Protocol):
    """What may come next, as a function of the tokens so far."""

    def mask(self, values: Tensor, output: Sequence[int]) -> None:
        """Set the logits [vocabulary] of all tokens to -∞ that may not follow the tokens of ``output``."""


@dataclass(slots=True, eq=False)
class SampledRow:
    """What the next token of one answer is chosen by.

    ``output`` are the tokens generated so far; it may be a list that somebody else appends to, and what was taken from
    it is never taken back. ``prompt`` may be in any order.
    """

    parameters: Parameters
    prompt: Sequence[int]
    output: Sequence[int]
    ends: Collection[int] = ()
    grammar: Grammar | None = None
    _counted: int = 0
    _counts: Tensor | None = None
    """How often each token was put out: float32 [vocabulary], whole numbers."""
    _known: Tensor | None = None
    """Whether each token is in the prompt: bool [vocabulary]."""
    _tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def adjusts(self) -> bool:
        """Whether the next token is not chosen from the model's own logits."""
        given = self.parameters
        return bool(
            given.logit_bias
            or given.repetition_penalty != 1
            or given.frequency_penalty
            or given.presence_penalty
            or (self.ends and len(self.output) < given.min_tokens)
            or self.grammar is not None
        )

    def adjust(self, values: Tensor) -> None:
        """Change a row of logits, float32 [vocabulary], in place.

        For a token with the logit z that occurs n times in the output, in this order:

        1. ``z + bias``, its entry in ``logit_bias`` (as in the API reference of OpenAI's completions).
        2. ``z / r if z > 0 else z * r`` with ``repetition_penalty`` r, if it is in the prompt or in the
           output (Keskar et al., "CTRL", arXiv:1909.05858, section 4.1, which divides; the rule for the
           sign is that of ``RepetitionPenaltyLogitsProcessor`` in transformers).
        3. ``z - frequency_penalty * n - presence_penalty * (n > 0)``. The prompt does not count (OpenAI's guide to
           frequency and presence penalties).
        4. -∞, if it ends a text and the output is shorter than ``min_tokens``.
        5. -∞, if the grammar does not allow it.
        """
        given = self.parameters
        if given.logit_bias:
            ids = self._tensor("biased", [token for token, _ in given.logit_bias], values)
            biases = self._tensor("biases", [bias for _, bias in given.logit_bias], values)
            values[ids] += biases
        if given.repetition_penalty != 1 or given.frequency_penalty or given.presence_penalty:
            counts, known = self._count(values)
            if given.repetition_penalty != 1:
                by = min(max(given.repetition_penalty, _LEAST), _MOST)
                changed = torch.where(values > 0, values / by, values * by).clamp_(-_LARGEST, _LARGEST)
                values.copy_(torch.where(known | (counts > 0), changed, values))
            if given.frequency_penalty:
                values.sub_(counts * given.frequency_penalty)
            if given.presence_penalty:
                values.sub_((counts > 0) * given.presence_penalty)
        if self.ends and len(self.output) < given.min_tokens:
            values[self._tensor("ends", [token for token in self.ends if token < len(values)], values)] = -torch.inf
        if self.grammar is not None:
            self.grammar.mask(values, self.output)

    def _count(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._known is None:
            self._counts = torch.zeros_like(like)
            self._known = torch.zeros_like(like, dtype=torch.bool)
            self._known[torch.tensor(self.prompt, dtype=torch.int64).to(like.device)] = True
        if new := self.output[self._counted :]:
            ids = torch.tensor(new, dtype=torch.int64).to(like.device)
            # Sums of ones are exact in any order.
            self._counts.index_add_(0, ids, torch.ones(len(new), device=like.device))
            self._counted += len(new)
        return self._counts, self._known

    def _tensor(self, name: str, values: Sequence[float], like: Tensor) -> Tensor:
        if name not in self._tensors:
            dtype = torch.float32 if name == "biases" else torch.int64
            self._tensors[name] = torch.tensor(values, dtype=dtype).to(like.device)
        return self._tensors[name]


def choose(logits: Tensor, rows: Sequence[SampledRow]) -> list[int]:
    """The next token of each row; -1 where its logits are no numbers.

    ``logits``: [rows, vocabulary], as they came from the model, on any device; they are not changed.
    """
    values = logits.float()
    if any(row.adjusts for row in rows):
        values = values.clone() if values.data_ptr() == logits.data_ptr() else values
        for place, row in enumerate(rows):
            if row.adjusts:
                row.adjust(values[place])
    top, chosen = values.max(dim=1)
    # Penalties would make a number of what is none.
    sound = top.isfinite() if values.data_ptr() == logits.data_ptr() else top.isfinite() & logits.amax(dim=1).isfinite()
    hot = [place for place, row in enumerate(rows) if row.parameters.temperature > 0]
    # On a CPU a row is computed by itself: what a vectorised loop leaves at its end, it computes with other functions.
    for places in [hot] if logits.device.type != "cpu" and hot else [[place] for place in hot]:
        some = [rows[place] for place in places]
        chosen[places] = _draw(values[places], top[places], some)
    return torch.where(sound, chosen, -1).tolist()  # type: ignore[no-any-return]


def _draw(values: Tensor, top: Tensor, rows: Sequence[SampledRow]) -> Tensor:
    """A token for each row of adjusted logits, drawn by the row's own noise. ``top`` are the rows' largest."""
    given = [row.parameters for row in rows]

    def column(numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32).to(values.device).unsqueeze(1)

    # Subtracting the largest first keeps a tiny temperature from overflowing.
    heat = column([min(max(item.temperature, _LEAST), _MOST) for item in given])
    weights = ((values - top.unsqueeze(1)) / heat).exp_()
    if any(item.min_p for item in given):
        weights.masked_fill_(weights < column([item.min_p for item in given]), 0)
    size = weights.shape[1]
    cut = [place for place, item in enumerate(given) if 0 < item.top_k < size or item.top_p < 1]
    if cut and values.device.type == "cpu":
        for place in cut:
            weights[place] = kept(weights[place], given[place].top_k, given[place].top_p)
    elif cut:
        weights[cut] = all_kept(
            weights[cut], [given[place].top_k for place in cut], [given[place].top_p for place in cut]
        )
    noise = exponential([(row.parameters.seed, len(row.output)) for row in rows], size, values.device)
    return (weights / noise).argmax(dim=1)


def kept(weights: Tensor, top_k: int, top_p: float) -> Tensor:
    """Weights [vocabulary] between 0 and 1, but 0 for what ``top_k``, then ``top_p``, leave out.

    Of the ``top_k`` strongest (0: all), ``top_p`` leaves the fewest that hold so much of their sum, strongest first and
    of equal ones the first. The strongest always stays.
    """
    size = len(weights)
    order = ids = torch.arange(size)
    for head in (min(size, max(_HEAD, top_k)), size):
        if head < size:
            ids = (weights >= weights.topk(head).values[-1]).nonzero().squeeze(1)
        else:
            ids = torch.arange(size)
        order = ids[weights[ids].sort(descending=True, stable=True).indices]
        if top_k:
            order = order[:top_k]
        if top_p >= 1:
            break
        amounts = _whole(weights[order])
        total = int(amounts.sum()) if top_k else int(_whole(weights).sum())
        count = int(torch.searchsorted(amounts.cumsum(0), int(top_p * total))) + 1
        if count <= len(order):
            order = order[:count]
            break
    result = torch.zeros_like(weights)
    result[order] = weights[order]
    return result


def all_kept(weights: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """As :func:`kept`, of many rows at once [rows, vocabulary], without waiting for the device."""
    size, device = weights.shape[1], weights.device
    ordered, order = weights.sort(dim=1, descending=True, stable=True)
    most = torch.tensor([k or size for k in top_k]).to(device).unsqueeze(1)
    amounts = _whole(ordered).masked_fill_(torch.arange(size, device=device) >= most, 0)
    sums = amounts.cumsum(1)
    part = torch.tensor(top_p, dtype=torch.float64).to(device).unsqueeze(1)
    wanted = torch.where(part < 1, (part * sums[:, -1:]).long(), sums[:, -1:])
    stays = (sums - amounts < wanted) & (amounts > 0)
    stays[:, 0] = True
    return torch.zeros_like(weights).scatter_(1, order, ordered * stays)


def _whole(weights: Tensor) -> Tensor:
    return (weights.double() * _WHOLE).long()


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


def strongest(values: NDArray[numpy.float64], count: int) -> NDArray[Any]:
    """Places of the ``count`` largest values, in ascending order; of equal ones the first."""
    if count >= len(values):
        return numpy.arange(len(values))
    least = numpy.partition(values, len(values) - count)[len(values) - count]
    above = numpy.flatnonzero(values > least)
    equal = numpy.flatnonzero(values == least)[: count - len(above)]
    return numpy.sort(numpy.concatenate((above, equal)))
