"""The keys and values of a prompt as a request's state, so that a resume need not compute them again.

Only the prompt's: a state is replaced as a whole, so each further block of generated tokens would
write the prompt's keys once more, and putting known tokens back is M times faster than decoding was.
The tokens stay the checkpoint. A state that is missing, cut short or another model's costs a
prefill, and changes nothing.
"""

from __future__ import annotations

from typing import Any, Final

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
    """The first ``positions`` of ``keys`` [layers, 2 K, positions, d] as a state.

    Not copied here: whoever stores a state copies its tensors, and the keys of a prompt stay as they are.
    """
    return {"kv": FORMAT, "fingerprint": fingerprint, "keys": keys[:, :, :positions]}


def held(state: Any) -> int:
    """How many positions a state says that it has; 0 for none."""
    keys = state.get("keys") if isinstance(state, dict) and state.get("kv") == FORMAT else None
    return int(keys.shape[2]) if isinstance(keys, Tensor) and keys.dim() == 4 else 0


def restore(state: Any, keys: Tensor, fingerprint: str) -> int:
    """Put a saved state into ``keys``; how many positions it held, 0 if it is none for these keys."""
    positions = held(state)
    if not 0 < positions <= keys.shape[2] or state.get("fingerprint") != fingerprint:
        return 0
    part = state["keys"]
    if part.dtype != keys.dtype or part.shape != keys[:, :, :positions].shape:
        return 0
    with torch.inference_mode():
        keys[:, :, :positions] = part.to(keys.device)
    return positions
