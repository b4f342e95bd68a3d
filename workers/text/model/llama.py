"""The Llama architecture, and its kin, in two canonical shapes.

A *prompt* token is always computed in a prefill shape: chunks of 4 P rows as long as the prompt fills
them, then of P rows, aligned to absolute positions, one prompt at a time. A *generated* token is always
computed in the decode shape: M rows, one token each, whichever requests they belong to. A token's keys,
values and logits are then a function of its prompt and the tokens before it alone: not of the batch, not
of the slot, not of whether it was computed for the first time or again by another process after a crash.

Who does not ask for that gets the ordinary shapes: as many rows as there are tokens, keys up to the
last position and no further, long chunks that begin anywhere (:meth:`Llama.extend`, ``exact=False``).
Nothing is computed for padding, and the bits depend on who else was there.

The rows of one decode pass may be consecutive positions of one request, if they are known: all
rows' keys are written before any row attends. So replay runs M times faster than decoding did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..bundle import Bundle
from .operators import Attended, Operators

BUCKET: Final = 128
"""Attention sees keys in multiples of this many positions, the rest of the last one masked."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one request, as rows of a decode pass. ``start`` is the first one's position."""

    keys: Tensor
    start: int
    tokens: Sequence[int]


class Llama:
    """A model on its device. Knows tokens, positions and keys; no requests.

    ``rows`` is M, ``chunk`` is P, ``block`` is 4 P; all are part of what the results depend on.
    """

    def __init__(self, bundle: Bundle, device: torch.device, slots: int, operators: Operators | None = None) -> None:
        """``slots``: how many requests may run at once; M is that, rounded up to a multiple of 4."""
        self.shape = bundle.shape
        self.device = device
        # Products of 5 to 7 rows were seen to depend on the place of a row; multiples of 4 were not.
        self.rows = -(-slots // 4) * 4
        # A pass must stay short beside a decode pass, and a GPU is idle with less than this.
        self.chunk = 32 if device.type == "cpu" else BUCKET
        # The weights are read once for all rows of a pass: in blocks a long prompt takes two thirds of the time.
        self.block = 4 * self.chunk
        tensors = {name: tensor.to(device) for name, tensor in bundle.tensors.items()}
        self.embedding = tensors["embedding"]
        self.dtype = self.embedding.dtype
        self.operators = operators or Operators(device, self.dtype, self.rows)
        self._layers = [self._layer(tensors, number) for number in range(self.shape.layers)]
        self._norm = tensors["norm"].float()
        self._head = self.operators.pack(tensors.get("head", self.embedding))
        positions = -(-self.shape.context // BUCKET) * BUCKET
        # In float64, then rounded: the tables are the same whichever way the cosine is vectorised.
        powers = torch.arange(0, self.shape.head_width, 2, dtype=torch.float64) / self.shape.head_width
        frequencies = self.shape.rope_base**-powers
        if self.shape.rope_factors:
            frequencies /= torch.tensor(self.shape.rope_factors, dtype=torch.float64)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
        self._cosine = torch.cat((angles.cos(), angles.cos()), dim=1).float().to(device)
        self._sine = torch.cat((-angles.sin(), angles.sin()), dim=1).float().to(device)
        # Any row's mask is a window of this: zeros for the past, -inf for what is not there yet.
        self._stairs = torch.cat((torch.zeros(positions), torch.full((BUCKET,), -torch.inf))).to(device)
        self._positions = positions

    def keys(self, tokens: int) -> Tensor:
        """Room for the keys and values of a request of so many tokens: [layers, 2 K, positions, d].

        It depends on the request alone, and so do its strides.
        """
        room = -(-tokens // BUCKET) * BUCKET
        return torch.zeros(
            (self.shape.layers, 2 * self.shape.kv_heads, room, self.shape.head_width),
            dtype=torch.float32,
            device=self.device,
        )

    def key_bytes(self, tokens: int) -> int:
        """Bytes of what :meth:`keys` gives for so many tokens."""
        shape = self.shape
        return 2 * shape.layers * shape.kv_heads * -(-tokens // BUCKET) * BUCKET * shape.head_width * 4

    def chunk_at(self, position: int, prompt: int) -> tuple[int, int]:
        """Where the chunk of a prompt of so many tokens begins that computes this position, and where it ends."""
        blocks = prompt // self.block * self.block
        size = self.block if position < blocks else self.chunk
        start = position // size * size
        return start, min(start + size, prompt)

    def prefill(self, keys: Tensor, start: int, tokens: Sequence[int]) -> Tensor:
        """Compute one chunk of a prompt, as :meth:`chunk_at` has cut it. Returns the last token's row [1, width]."""
        with torch.inference_mode():
            count = len(tokens)
            padded = torch.zeros(self.block if count == self.block else self.chunk, dtype=torch.int64)
            padded[:count] = torch.tensor(tokens)
            return self._chunk(keys, start, padded, count, -(-(start + count) // BUCKET) * BUCKET)

    def extend(self, keys: Tensor, start: int, tokens: Sequence[int]) -> Tensor:
        """Compute any number of known tokens from any position, not exactly. Returns the last one's row [1, width]."""
        with torch.inference_mode():
            return self._chunk(keys, start, torch.tensor(tokens), len(tokens), start + len(tokens))

    def decode(self, runs: Sequence[Run], *, exact: bool = True) -> Tensor:
        """Compute at most M generated tokens; returns [M, width], the runs' rows first, in their order.

        Without ``exact`` there are no other rows.
        """
        with torch.inference_mode():
            rows = self.rows if exact else sum(len(run.tokens) for run in runs)
            tokens, places, seen = [0] * rows, [0] * rows, []
            writes = []
            row = 0
            for run in runs:
                writes.append((run.keys, run.start, row, len(run.tokens)))
                for position, token in enumerate(run.tokens, start=run.start):
                    tokens[row], places[row] = token, position
                    length = (position // BUCKET + 1) * BUCKET if exact else position + 1
                    first = self._positions - position - 1
                    seen.append(
                        Attended(row, run.keys, length, self._stairs[first : first + length].view(1, 1, length))
                    )
                    row += 1
            heads = self.shape.heads

            def attend(layer: int, qkv: Tensor) -> Tensor:
                for keys, start, row, count in writes:
                    keys[layer, :, start : start + count] = qkv[row : row + count, heads:].transpose(0, 1)
                return self.operators.attend(qkv[:, :heads], seen, layer)

            return self._forward(torch.tensor(tokens), torch.tensor(places), attend)

    def logits(self, x: Tensor, *, exact: bool = True) -> NDArray[Any]:
        """The logits of up to M rows [rows, width], as float32 on the host: [rows, vocabulary]."""
        with torch.inference_mode():
            count = len(x)
            if exact and count < self.rows:
                x = torch.cat((x, x.new_zeros(self.rows - count, x.shape[1])))
            x = self.operators.norm(x, self._norm, self.shape.norm_epsilon)
            result: NDArray[Any] = self.operators.linear(x, self._head)[:count].cpu().numpy()
            return result

    def weights(self) -> dict[str, Tensor]:
        """One packed weight of each shape that products are computed with, by name."""
        layer = self._layers[0]
        return {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down, "head": self._head}

    def _chunk(self, keys: Tensor, start: int, tokens: Tensor, count: int, length: int) -> Tensor:
        places = torch.arange(start, start + len(tokens))
        future = torch.arange(length).unsqueeze(0) > places.unsqueeze(1)
        mask = torch.zeros(len(tokens), length).masked_fill(future, -torch.inf).to(self.device)
        heads = self.shape.heads

        def attend(layer: int, qkv: Tensor) -> Tensor:
            # Rows of padding leave no keys behind.
            keys[layer, :, start : start + count] = qkv[:count, heads:].transpose(0, 1)
            return self.operators.attend_chunk(qkv[:, :heads].contiguous(), keys[layer, :, :length], mask)

        x = self._forward(tokens, places, attend)
        return x[count - 1 : count]

    def _forward(self, tokens: Tensor, places: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        shape, operators = self.shape, self.operators
        places = places.to(self.device)
        cosine, sine = self._cosine[places].unsqueeze(1), self._sine[places].unsqueeze(1)
        x = self.embedding[tokens.to(self.device)].float()
        rows, rotated = len(tokens), shape.heads + shape.kv_heads
        for number, layer in enumerate(self._layers):
            qkv = operators.linear(operators.norm(x, layer.norm_in, shape.norm_epsilon), layer.qkv)
            if layer.qkv_bias is not None:
                qkv = qkv + layer.qkv_bias
            qkv = qkv.view(rows, rotated + shape.kv_heads, shape.head_width)
            turned = qkv[:, :rotated]
            if layer.norm_heads is not None:
                turned = operators.norm_heads(turned, layer.norm_heads, shape.norm_epsilon)
            qkv = torch.cat((operators.rotate(turned, cosine, sine), qkv[:, rotated:]), dim=1)
            x = x + self._whole(operators.linear(attend(number, qkv), layer.out))
            gated = operators.linear(operators.norm(x, layer.norm_mid, shape.norm_epsilon), layer.gate_up)
            x = x + self._whole(operators.linear(operators.gate(gated), layer.down))
        return x

    def _whole(self, part: Tensor) -> Tensor:
        """The sum of which a product over split heads, or split hidden numbers, is a part; here it is whole."""
        return part

    def _layer(self, tensors: dict[str, Tensor], number: int) -> _Layer:
        name = f"layers.{number}."
        pack = self.operators.pack
        bias = tensors[name + "qkv_bias"].float() if self.shape.qkv_bias else None
        norms = None
        if self.shape.head_norms:
            counts = {"norm_q": self.shape.heads, "norm_k": self.shape.kv_heads}
            norms = torch.cat([tensors[name + part].float().expand(count, -1) for part, count in counts.items()])
        return _Layer(
            norm_in=tensors[name + "norm_in"].float(),
            qkv=pack(tensors[name + "qkv"]),
            out=pack(tensors[name + "out"]),
            norm_mid=tensors[name + "norm_mid"].float(),
            gate_up=pack(tensors[name + "gate_up"]),
            down=pack(tensors[name + "down"]),
            qkv_bias=bias,
            norm_heads=norms,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    norm_in: Tensor
    qkv: Tensor
    out: Tensor
    norm_mid: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    norm_heads: Tensor | None
    """[H + K, d]: a row for each query and key head."""
