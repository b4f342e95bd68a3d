"""A file's tensors in the engine's layout (:mod:`..bundle`), each looked at before it is put together with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

from ..bundle import Shape, halves

Take = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Reads the tensor of this name, which must have this shape. Raises :class:`SettingsError` if it has another."""

HUB: Final = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers",
    "norm_in": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "norm_q": "self_attn.q_norm",
    "norm_k": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "norm_mid": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""The engine's names and those of ``transformers``."""

GGUF: Final = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "layer": "blk",
    "norm_in": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "norm_q": "attn_q_norm",
    "norm_k": "attn_k_norm",
    "out": "attn_output",
    "norm_mid": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""The engine's names and those of GGUF files."""


def layers(shape: Shape, names: Mapping[str, str], take: Take, *, pairs: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of all layers. ``pairs``: queries and keys are rotated in pairs of neighbours, and not in halves."""
    result: dict[str, torch.Tensor] = {}
    for number in range(shape.layers):
        found = _layer(shape, names, take, f"{names['layer']}.{number}", pairs)
        result |= {f"layers.{number}.{name}": tensor for name, tensor in found.items()}
    return result


def _layer(shape: Shape, names: Mapping[str, str], take: Take, prefix: str, pairs: bool) -> dict[str, torch.Tensor]:
    width, hidden, d = shape.width, shape.hidden, shape.head_width
    sizes = {"q": shape.heads * d, "k": shape.kv_heads * d, "v": shape.kv_heads * d}

    def read(part: str, *size: int, kind: str = "weight") -> torch.Tensor:
        return take(f"{prefix}.{names[part]}.{kind}", size)

    def weight(part: str) -> torch.Tensor:
        found = read(part, sizes[part], width)
        return halves(found, sizes[part] // d) if pairs and part != "v" else found

    result = {
        "norm_in": read("norm_in", width),
        "qkv": torch.cat([weight(part) for part in sizes]),
        "out": read("out", width, shape.heads * d),
        "norm_mid": read("norm_mid", width),
        "gate_up": torch.cat((read("gate", hidden, width), read("up", hidden, width))),
        "down": read("down", width, hidden),
    }
    if shape.qkv_bias:
        result["qkv_bias"] = torch.cat([read(part, size, kind="bias") for part, size in sizes.items()])
    if shape.head_norms:
        result |= {part: read(part, d) for part in ("norm_q", "norm_k")}
    return result
