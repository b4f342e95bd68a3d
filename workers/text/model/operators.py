"""The operators of the model, each chosen so that a row's result does not depend on the other rows.

Most kernels are not so: they split sums by the number of rows, or by the thread that gets them.
What is used here was measured to be so at fixed shapes, and :mod:`.exactness` measures it again at
every start. A matrix product always has the same number of rows, occupied or not. Attention runs row
by row, since the batched kernels give a row other bits in another place as soon as there are two
threads. It runs in float32: its share of the time is small, and so keys need no second layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Attended:
    """What one row attends to.

    ``keys`` is [layers, 2 K, positions, d]: K heads of keys, then K of values. The row sees
    ``length`` positions of it, of which ``mask`` ([1, 1, length], 0 or -inf) leaves its past.
    """

    row: int
    keys: Tensor
    length: int
    mask: Tensor


class Operators:
    """Operators for one device; a test puts a broken one in the place of one of these."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int) -> None:
        self._rows = rows
        self._packs = device.type == "cpu" and _can_pack(dtype)

    @property
    def name(self) -> str:
        """Names the kernels, for the fingerprint."""
        return "onednn-packed" if self._packs else "linear"

    def pack(self, weight: Tensor) -> Tensor:
        """A weight [outputs, inputs] as :meth:`linear` wants it.

        On a CPU it is laid out once for oneDNN, which halves the time of a step.
        """
        if self._packs:
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)
            return packed
        # Kernels may treat what is not aligned in another way than what is: let all be aligned.
        return weight.contiguous() if weight.data_ptr() % 64 == 0 else weight.clone()

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """[rows, inputs] times a packed weight, in the weight's dtype, as float32 [rows, outputs]."""
        x = x.to(weight.dtype)
        if self._packs:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        else:
            result = functional.linear(x, weight)
        return result.float()

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Root mean square norm of each row, in float32."""
        return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)

    def norm_heads(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """The same of each head: [rows, heads, d], with a weight of its own for each head [heads, d]."""
        return functional.rms_norm(x.contiguous(), (x.shape[-1],), None, epsilon) * weight

    def gate(self, x: Tensor) -> Tensor:
        """[rows, 2 · hidden] to [rows, hidden]: the first half, through SiLU, times the second."""
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotary positions: [rows, heads, d] with tables [rows, 1, d]; the sine's first half is negated.

        Two products and a sum, each rounded once: equal bits however the loop is vectorised.
        """
        rows, heads, width = x.shape
        swapped = x.view(rows, heads, 2, width // 2).flip(2).view(rows, heads, width)
        return x * cosine + swapped * sine

    def attend(self, queries: Tensor, seen: Sequence[Attended], layer: int) -> Tensor:
        """Attention of single rows: [rows, H, d] to [rows, H · d]; rows that see nothing stay 0."""
        rows, heads, width = queries.shape
        result = queries.new_zeros(rows, heads * width)
        for item in seen:
            keys = item.keys[layer]
            groups = keys.shape[0] // 2
            query = queries[item.row].view(groups, heads // groups, width)
            out = self._attend(query, keys[:groups, : item.length], keys[groups:, : item.length], item.mask)
            result[item.row] = out.reshape(-1)
        return result

    def attend_chunk(self, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Attention of a chunk of one prompt: [P, H, d], keys [2 K, length, d], mask [P, length]."""
        rows, heads, width = queries.shape
        groups = keys.shape[0] // 2
        members = heads // groups
        query = queries.view(rows, groups, members, width).permute(1, 2, 0, 3).reshape(groups, members * rows, width)
        out = self._attend(query, keys[:groups], keys[groups:], mask.repeat(members, 1).unsqueeze(0))
        return out.view(groups, members, rows, width).permute(2, 0, 1, 3).reshape(rows, heads * width)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
        return torch.bmm(torch.softmax(scores, dim=-1), values)


def _can_pack(dtype: torch.dtype) -> bool:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=dtype), 8)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(8, 32, dtype=dtype), weight, None, "none", [], "")
    except RuntimeError:  # this processor lacks what oneDNN needs for this dtype
        return False
    return True
