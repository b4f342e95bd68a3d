"""A model as it was read: its shape, its tensors in one layout, its vocabulary.

Whatever file a model comes from, its tensors end in the same layout, so that the engine knows one:

========================  ======================  ==================================================
``embedding``             [vocabulary, width]
``head``                  [vocabulary, width]     absent when it is the embedding
``norm``                  [width]
``layers.N.norm_in``      [width]                 before attention
``layers.N.qkv``          [(H + 2 K) · d, width]  queries, keys, values; rotary halves, not pairs
``layers.N.out``          [width, H · d]
``layers.N.norm_mid``     [width]                 before the gated layer
``layers.N.gate_up``      [2 · hidden, width]     gate, then up
``layers.N.down``         [width, hidden]
``layers.N.qkv_bias``     [(H + 2 K) · d]         only with ``qkv_bias``
``layers.N.norm_q``       [d]                     only with ``head_norms``: of each query, before it is rotated
``layers.N.norm_k``       [d]                     the same of each key
========================  ======================  ==================================================

H query heads, K key and value heads, d numbers a head.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

import torch

from ...protocol.errors import SettingsError
from .tokenizer import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of a model of the Llama architecture, or of one that differs from it by what the last three say.

    ``context`` is in tokens. ``rope_factors``: what the frequency of each pair of rotated numbers is divided by, d / 2
    of them; none of them where positions are not scaled.
    """

    vocabulary: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    rope_base: float
    norm_epsilon: float
    rope_factors: tuple[float, ...] = ()
    qkv_bias: bool = False
    head_norms: bool = False

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if item.type in ("int", "float") and not getattr(self, item.name) > 0:
                raise SettingsError(f"the model's {item.name} must be more than 0, not {getattr(self, item.name)}")
        if self.heads % self.kv_heads or self.head_width % 2:
            raise SettingsError(
                f"{self.heads} heads of width {self.head_width} over {self.kv_heads} key heads is not a Llama model"
            )
        if self.rope_factors and len(self.rope_factors) != self.head_width // 2:
            raise SettingsError(
                f"the model scales {len(self.rope_factors)} rotary frequencies, but has {self.head_width // 2}"
            )
        if not all(0 < factor < math.inf for factor in self.rope_factors):
            raise SettingsError("the model divides a rotary frequency by what is no finite number above 0")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Shape:
        values = json.loads(text)
        return cls(**values | {"rope_factors": tuple(values["rope_factors"])})

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, but for ``head``, which may be absent."""
        width, hidden = self.width, self.hidden
        result: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary, width), "norm": (width,)}
        for layer in range(self.layers):
            result |= {
                f"layers.{layer}.norm_in": (width,),
                f"layers.{layer}.qkv": ((self.heads + 2 * self.kv_heads) * self.head_width, width),
                f"layers.{layer}.out": (width, self.heads * self.head_width),
                f"layers.{layer}.norm_mid": (width,),
                f"layers.{layer}.gate_up": (2 * hidden, width),
                f"layers.{layer}.down": (width, hidden),
            }
            if self.qkv_bias:
                result[f"layers.{layer}.qkv_bias"] = ((self.heads + 2 * self.kv_heads) * self.head_width,)
            if self.head_norms:
                result |= {f"layers.{layer}.norm_{part}": (self.head_width,) for part in "qk"}
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One model in memory. ``digest`` names its weights, tokenizer and template, in hex: see :func:`named`."""

    shape: Shape
    tensors: dict[str, torch.Tensor]
    vocabulary: Vocabulary
    digest: str

    def __post_init__(self) -> None:
        expected = self.shape.tensors()
        if "head" in self.tensors:
            expected["head"] = expected["embedding"]
        for name, shape in expected.items():
            if name not in self.tensors:
                raise SettingsError(f"the model has no tensor for {name}")
            if tuple(self.tensors[name].shape) != shape:
                raise SettingsError(f"{name} should have the shape {shape}, but has {tuple(self.tensors[name].shape)}")
        if unknown := sorted(set(self.tensors) - set(expected)):
            raise SettingsError(f"the model has tensors that are not supported: {', '.join(unknown[:5])}")


def named(files: str, shape: Shape, vocabulary: Vocabulary) -> str:
    """The digest of a model: of its files, and of what was made of them. A release that reads the same tokenizer in
    another way must not go on with what an older one has begun.
    """
    return hashlib.sha256("\0".join((files, shape.to_json(), vocabulary.to_json())).encode()).hexdigest()


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key weight from rotary pairs (0 1, 2 3, …) to rotary halves (0 2 … 1 3 …).

    ``weight`` is [heads · d, width]. GGUF files hold pairs, hubs hold halves.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
