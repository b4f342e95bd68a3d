"""The keys and values of a prompt as a request's state, so that a resume need not compute them again.

Only the prompt's: a state is replaced as a whole, so each further block of generated tokens would
write the prompt's keys once more, and putting known tokens back is M times faster than decoding was.
The tokens stay the checkpoint. A state that is missing, cut short or another model's costs a
prefill, and changes nothing.
"""

from __future__ import annotations

from typing import Any, Final

import numpy
import torch
from torch import Tensor

FORMAT: Final = 1
"""To be raised with every change of the layout: a state of another format is not read."""

_OVERHEAD: Final = 1024
"""Bytes of a packed state that are not keys; there are fewer."""


def room(keys: Tensor, positions: int, step: int, limit: int) -> int:
    """How many of the first ``positions`` fit into a state of ``limit`` bytes: all, or a multiple of ``step``."""
    layers, heads, _, width = keys.shape
    fitting = max(0, limit - _OVERHEAD) // (layers * heads * width * keys.element_size())
    return positions if fitting >= positions else fitting // step * step


def save(keys: Tensor, positions: int, fingerprint: str) -> dict[str, Any]:
    """The first ``positions`` of ``keys`` [layers, 2 K, positions, d] as a state: plain values and bytes."""
    part = keys[:, :, :positions].contiguous().cpu()
    return {
        "kv": FORMAT,
        "fingerprint": fingerprint,
        "dtype": str(part.dtype).removeprefix("torch."),
        "shape": list(part.shape),
        "data": part.view(torch.uint8).numpy().tobytes(),
    }


def held(state: Any) -> int:
    """How many positions a state says that it has; 0 for none."""
    return int(state["shape"][2]) if isinstance(state, dict) and state.get("kv") == FORMAT else 0


def restore(state: Any, keys: Tensor, fingerprint: str) -> int:
    """Put a saved state into ``keys``; how many positions it held, 0 if it is none for these keys."""
    if not isinstance(state, dict) or state.get("kv") != FORMAT or state.get("fingerprint") != fingerprint:
        return 0
    shape, data = state.get("shape"), state.get("data")
    layers, heads, positions, width = keys.shape
    if not (
        state.get("dtype") == str(keys.dtype).removeprefix("torch.")
        and isinstance(shape, list)
        and len(shape) == 4
        and [*shape[:2], shape[3]] == [layers, heads, width]
        and isinstance(shape[2], int)
        and 0 < shape[2] <= positions
        and isinstance(data, bytes)
        and len(data) == layers * heads * shape[2] * width * keys.element_size()
    ):
        return 0
    # A copy: what frombuffer gives cannot be written to, of which torch warns.
    part = torch.from_numpy(numpy.frombuffer(data, dtype=numpy.uint8).copy()).view(keys.dtype).view(shape)
    keys[:, :, : shape[2]] = part.to(keys.device)
    return int(shape[2])
