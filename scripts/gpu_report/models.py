"""Models that are made on the device from a seed: nothing is fetched, and nothing travels.

They are written as a folder that hubs would have, so that a worker loads them as it loads any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from ...workers.text.bundle import Shape
from ...workers.text.weights.tiny import tiny
from .stage import ReportStage

SEED: Final = 20261130

LARGE: Final = Shape(
    vocabulary=32_768,
    width=2048,
    hidden=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    head_width=64,
    context=2048,
    rope_base=500_000.0,
    norm_epsilon=1e-5,
)
"""The shape of Llama 3.2 1B with a quarter of its vocabulary: 1.04 billion parameters."""

SMALL: Final = Shape(
    vocabulary=512,
    width=64,
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    context=1024,
    rope_base=10_000.0,
    norm_epsilon=1e-5,
)
"""For a rehearsal: the same code in milliseconds."""


def shape_of(stage: ReportStage) -> Shape:
    """That of the model of this run."""
    return SMALL if stage.rehearsal else LARGE


def parameters(shape: Shape) -> int:
    """How many numbers it has; the head is the embedding."""
    return sum(int(torch.Size(size).numel()) for size in shape.tensors().values())


def folder(stage: ReportStage) -> Path:
    """The folder of the model, in bfloat16; made by the first step that asks."""
    place = stage.shared / "model"
    if not place.exists():
        unfinished = stage.folder / "model"
        write(shape_of(stage), unfinished, stage.device)
        try:
            unfinished.rename(place)
        except OSError:
            if not place.exists():
                raise
    return place


def write(shape: Shape, place: Path, device: str) -> None:
    """Make a model of a seed on a device, and write it down."""
    generator = torch.Generator(device).manual_seed(SEED)

    def made(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        # What flows through the layers keeps its size, as in a model that was trained.
        return (values * size[-1] ** -0.5).to(torch.bfloat16).cpu()

    width, heads, keys = shape.width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    one = torch.ones(width, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": made(shape.vocabulary, width), "model.norm.weight": one}
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.input_layernorm.weight": one.clone(), f"{layer}.post_attention_layernorm.weight": one.clone(),
            f"{layer}.self_attn.q_proj.weight": made(heads, width),
            f"{layer}.self_attn.k_proj.weight": made(keys, width),
            f"{layer}.self_attn.v_proj.weight": made(keys, width),
            f"{layer}.self_attn.o_proj.weight": made(width, heads),
            f"{layer}.mlp.gate_proj.weight": made(shape.hidden, width),
            f"{layer}.mlp.up_proj.weight": made(shape.hidden, width),
            f"{layer}.mlp.down_proj.weight": made(width, shape.hidden),
        }  # fmt: skip
    place.mkdir(parents=True)
    save_file(tensors, str(place / "model.safetensors"), metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config(shape)), encoding="utf-8")
    (place / "tokenizer.json").write_text(tiny(torch.float32).vocabulary.definition, encoding="utf-8")


def config(shape: Shape) -> dict[str, Any]:
    """As ``transformers`` reads it. No token ends a text."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width, "max_position_embeddings": shape.context, "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base, "tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
