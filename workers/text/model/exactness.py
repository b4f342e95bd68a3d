"""The proof, made anew at every start, that this process computes exactly.

Whether a kernel gives a row the same bits in every slot depends on the processor, the library, the
shapes and the number of threads. So the engine does not trust a list: it computes the same rows in
every slot, beside other neighbours and alone, one by one and as a replay, and compares bits. Where
one differs it refuses to start; slightly different answers after a crash would be worse.

The bits themselves go into the fingerprint: a machine that computes others does not continue
what this one began.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from ....protocol.errors import SettingsError
from ..noise import uniform
from .llama import BUCKET, Llama, Run

_SEED = 1


def self_check(llama: Llama) -> str:
    """Compare, and return a digest of the bits.

    Raises :class:`SettingsError` naming the operator, or the way of computing, that differs.
    """
    check_operators(llama)
    digest = hashlib.sha256()
    for array in (_check_slots(llama), _check_replay(llama), _check_prefill(llama)):
        digest.update(numpy.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_operators(llama: Llama) -> None:
    """Each operator that works on all rows at once: a row's result is the same in every slot."""
    shape, operators, rows = llama.shape, llama.operators, llama.rows
    with torch.inference_mode():
        for name, weight in llama.weights().items():
            width = {"out": shape.heads * shape.head_width, "down": shape.hidden}.get(name, shape.width)

            def product(x: Tensor, weight: Tensor = weight) -> Tensor:
                return operators.linear(x, weight)

            _check_rows(llama, f"the product with {name}", product, _noise(llama, rows, width))
        scale = torch.ones(shape.width, device=llama.device)
        epsilon = shape.norm_epsilon
        _check_rows(llama, "norm", lambda x: operators.norm(x, scale, epsilon), _noise(llama, rows, shape.width))
        if shape.head_norms:
            heads = shape.heads + shape.kv_heads

            def norm_heads(x: Tensor) -> Tensor:
                ones = torch.ones(heads, shape.head_width, device=llama.device)
                return operators.norm_heads(x.view(rows, heads, -1), ones, epsilon).view(rows, -1)

            _check_rows(llama, "head norm", norm_heads, _noise(llama, rows, heads * shape.head_width))
        _check_rows(llama, "gate", operators.gate, _noise(llama, rows, 2 * shape.hidden))


def _check_rows(llama: Llama, what: str, operator: Callable[[Tensor], Tensor], x: Tensor) -> None:
    expected = operator(x)
    for shift in range(1, len(x)):
        found = operator(x.roll(shift, 0)).roll(-shift, 0)
        alone = torch.zeros_like(x)
        alone[shift] = x[0]
        if not (torch.equal(found, expected) and torch.equal(operator(alone)[shift], expected[0])):
            raise _inexact(llama, what)


def _check_slots(llama: Llama) -> Any:
    """Whole decode passes: every request in every slot, and alone. Returns logits [M, vocabulary]."""
    rows = llama.rows
    most = min(llama.shape.context, 2 * BUCKET) - 1
    # Short and long pasts, and both sides of a bucket's end.
    starts = [min(most, place) for place in (0, 5, BUCKET - 1, BUCKET, 1, 200, 64, 100)]
    runs = [_run(llama, number, starts[number % len(starts)], 1) for number in range(rows)]
    expected = llama.logits(llama.decode(runs))
    for shift in range(1, rows):
        rolled = [*runs[-shift:], *runs[:-shift]]
        found = numpy.roll(llama.logits(llama.decode(rolled)), -shift, axis=0)
        if not numpy.array_equal(found, expected):
            raise _inexact(llama, "a decode pass in another slot")
    for number in (0, rows - 1):
        if not numpy.array_equal(llama.logits(llama.decode([runs[number]]))[0], expected[number]):
            raise _inexact(llama, "a decode pass without neighbours")
    return expected


def _check_replay(llama: Llama) -> Any:
    """Known tokens in one pass against one pass each. Returns the keys and values they left."""
    count = min(3, llama.rows)
    start = min(llama.shape.context, BUCKET + 1) - count
    replayed, decoded = _run(llama, 0, start, count), _run(llama, 0, start, count)
    together = llama.logits(
        llama.decode([_run(llama, 1, 7, 1), replayed]) if llama.rows > count else llama.decode([replayed])
    )
    last = together[count] if llama.rows > count else together[count - 1]
    for place, token in enumerate(decoded.tokens):
        logits = llama.logits(llama.decode([Run(decoded.keys, start + place, [token])]))[0]
    if not (torch.equal(replayed.keys, decoded.keys) and numpy.array_equal(last, logits)):
        raise _inexact(llama, "a replay")
    return decoded.keys[:, :, start : start + count].cpu().numpy()


def _check_prefill(llama: Llama) -> Any:
    """A chunk and a block of a prompt, each twice. Returns the rows of their last tokens."""
    rows = []
    for count in (min(llama.chunk, llama.shape.context) - 1, min(llama.block, llama.shape.context)):
        tokens = [number % llama.shape.vocabulary for number in range(count)]
        first, second = (_prefilled(llama, tokens) for _ in range(2))
        if not torch.equal(first, second):
            raise _inexact(llama, "a prefill pass, repeated,")
        rows.append(first)
    return torch.cat(rows).cpu().numpy()


def _prefilled(llama: Llama, tokens: list[int]) -> Tensor:
    keys = llama.keys(len(tokens))
    place = 0
    while place < len(tokens):
        _, end = llama.chunk_at(place, len(tokens))
        last = llama.prefill(keys, place, tokens[place:end])
        place = end
    return last


def _run(llama: Llama, number: int, start: int, count: int) -> Run:
    """A request with an invented past: ``start`` positions of noise."""
    keys = llama.keys(start + count)
    layers, heads, _, width = keys.shape
    keys[:, :, :start] = _noise(llama, layers * heads * start, width, salt=number).view(layers, heads, start, width)
    return Run(keys, start, [(7 * number + place) % llama.shape.vocabulary for place in range(count)])


def _noise(llama: Llama, rows: int, width: int, salt: int = 0) -> Tensor:
    """[rows, width] between -1 and 1, equal in every process."""
    values = uniform(_SEED, salt, numpy.arange(rows * width)) * 2 - 1
    return torch.from_numpy(values.astype(numpy.float32)).view(rows, width).to(llama.device)


def _inexact(llama: Llama, what: str) -> SettingsError:
    return SettingsError(
        f"exact generation refused: {what} gives other bits ({llama.operators.name}, {llama.dtype}, {llama.rows} rows, "
        f"{torch.get_num_threads()} threads, {llama.device}); try other values of PERDURE_THREADS or PERDURE_SLOTS"
    )
