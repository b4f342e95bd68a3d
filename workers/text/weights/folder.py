"""Models from a folder as hubs lay it out: config.json, tokenizer.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ....protocol.errors import SettingsError
from ..bundle import Bundle, Shape
from .folder_files import digest, read_json, weight_files
from .folder_tokenizer import FILES, TEMPLATES, read_vocabulary
from .layout import HUB, layers


def read_folder(folder: Path, dtype: torch.dtype) -> Bundle:
    """Read a model folder as ``transformers`` reads it.

    Raises :class:`SettingsError` when something is missing or not supported.
    """
    # An adapter has no config.json, and what it is should be said first.
    config = read_json(folder / "config.json", required=not (folder / "adapter_config.json").exists())
    files, read = weight_files(folder, config)
    shape = _shape(config, folder)

    def take(name: str, expected: tuple[int, ...]) -> torch.Tensor:
        if name not in files:
            raise SettingsError(f"{folder} has no tensor {name}")
        with safe_open(files.pop(name), framework="pt", device="cpu") as opened:
            result: torch.Tensor = opened.get_tensor(name)
        if tuple(result.shape) != expected:
            raise SettingsError(
                f"{folder}: {name} should have the shape {expected} by config.json, but has {tuple(result.shape)}"
            )
        return result.to(dtype)

    size = (shape.vocabulary, shape.width)
    embedding, head = (f"{HUB[name]}.weight" for name in ("embedding", "head"))
    tied = bool(config.get("tie_word_embeddings", False))
    # Of two that are tied one is enough, whichever it is; where both are there and differ, they are not tied.
    tensors = {"embedding": take(embedding if embedding in files or not tied else head, size)}
    if not tied or head in files:
        tensors["head"] = take(head, size)
        if tied and torch.equal(tensors["head"], tensors["embedding"]):
            del tensors["head"]
    tensors["norm"] = take(f"{HUB['norm']}.weight", (shape.width,))
    tensors |= layers(shape, HUB, take)
    # Old exports store the rotary frequencies, which are computed.
    left = [name for name in files if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise SettingsError(f"{folder} has tensors that are not supported: {', '.join(sorted(left)[:5])}")
    beside = [*(folder / name for name in ("config.json", *FILES)), *sorted((folder / TEMPLATES).glob("*.jinja"))]
    found = digest([*beside, *read])
    return Bundle(shape=shape, tensors=tensors, vocabulary=read_vocabulary(folder, config), digest=found)


def _shape(config: Mapping[str, Any], folder: Path) -> Shape:
    def refuse(what: str) -> SettingsError:
        return SettingsError(f"{folder}: {what} is not supported")

    if config.get("model_type") != "llama":
        raise refuse(f"model_type {config.get('model_type')!r}")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act {config['hidden_act']!r}")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name):
            raise refuse(name)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(f"rope_scaling {kind!r}")
    try:
        heads = config["num_attention_heads"]
        return Shape(
            vocabulary=config["vocab_size"],
            width=config["hidden_size"],
            hidden=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            context=config["max_position_embeddings"],
            rope_base=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            norm_epsilon=config["rms_norm_eps"],
        )
    except KeyError as error:
        raise SettingsError(f"{folder}/config.json does not say its {error.args[0]}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise SettingsError(f"{folder}/config.json has no such shape: {error}") from None
