"""The models that come with Perdure as a folder that other engines read: the layout of a model hub."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from ....protocol.settings import Settings
from ..bundle import Bundle, Shape
from .models import read

NAMED: Final = ("smollm2", "tiny")
"""What ``PERDURE_MODEL`` may say that is neither a file nor a folder."""


def folder_of(settings: Settings) -> str:
    """The folder, or the name, of the model that the settings name. One of :data:`NAMED` is written into the cache
    first, in the settings' dtype.

    Raises :class:`~perdure.protocol.errors.SettingsError` as :func:`~.models.read` does.
    """
    if settings.model not in NAMED:
        return settings.model
    bundle = read(settings)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "perdure"
    place = root / f"{settings.model}-{settings.dtype}-{bundle.digest[:16]}"
    if not place.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            written = Path(scratch) / "model"
            write(bundle, written)
            try:
                written.rename(place)
            except OSError:  # another worker was first
                if not place.exists():
                    raise
    return str(place)


def write(bundle: Bundle, folder: Path) -> None:
    """Write a model into a new folder: ``config.json``, ``model.safetensors`` and the tokenizer's files."""
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(bundle).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = bundle.vocabulary
    ends = list(vocabulary.ends) or None
    config = _config(bundle.shape) | {
        "eos_token_id": ends,
        "tie_word_embeddings": "head" not in bundle.tensors,
        "dtype": str(bundle.tensors["embedding"].dtype).removeprefix("torch."),
    }
    tokenizer: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": vocabulary.template or None,
    }
    # Engines end a text at eos_token, whatever the configuration says.
    tokenizer |= {name: text for name, text in vocabulary.specials.items() if ends or name != "eos_token"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "tokenizer.json").write_text(vocabulary.definition)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": shape.norm_epsilon,
        "hidden_act": "silu",
        "bos_token_id": None,
    }


def _tensors(bundle: Bundle) -> dict[str, torch.Tensor]:
    shape, ours = bundle.shape, bundle.tensors
    result = {"model.embed_tokens.weight": ours["embedding"], "model.norm.weight": ours["norm"]}
    if "head" in ours:
        result["lm_head.weight"] = ours["head"]
    own = shape.kv_heads * shape.head_width
    for layer in range(shape.layers):
        name, theirs = f"layers.{layer}", f"model.layers.{layer}"
        query, key, value = ours[f"{name}.qkv"].split([shape.heads * shape.head_width, own, own])
        gate, up = ours[f"{name}.gate_up"].chunk(2)
        result |= {
            f"{theirs}.input_layernorm.weight": ours[f"{name}.norm_in"],
            f"{theirs}.self_attn.q_proj.weight": query,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": ours[f"{name}.out"],
            f"{theirs}.post_attention_layernorm.weight": ours[f"{name}.norm_mid"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": ours[f"{name}.down"],
        }
    return result
