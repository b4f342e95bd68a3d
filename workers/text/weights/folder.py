"""Models from a folder as hubs lay it out: config.json, tokenizer.json and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ....protocol.errors import SettingsError
from ..bundle import Bundle, Shape
from ..tokenizer import END_NAMES, Vocabulary
from .folder_files import digest, read_json, weight_files
from .layout import HUB, layers

_READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


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
    read = [*(folder / name for name in _READ), *read]
    return Bundle(shape=shape, tensors=tensors, vocabulary=_vocabulary(folder, config), digest=digest(read))


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


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    definition = (folder / "tokenizer.json").read_text("utf-8") if (folder / "tokenizer.json").exists() else ""
    if not definition:
        raise SettingsError(f"{folder} holds no tokenizer.json")
    extra = read_json(folder / "tokenizer_config.json", required=False)
    generation = read_json(folder / "generation_config.json", required=False)
    ends: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        ends |= set(value if isinstance(value, list) else [] if value is None else [value])
    specials = {
        token["content"]: token["id"] for token in json.loads(definition).get("added_tokens", ()) if token["special"]
    }
    ends |= {specials[name] for name in END_NAMES if name in specials}
    template = extra.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default", "")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return Vocabulary(
        definition=definition,
        ends=tuple(sorted(ends)),
        post_process=True,
        template=template,
        specials={name: _text(extra.get(name)) for name in ("bos_token", "eos_token")},
    )


def _text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""
