"""Models from a folder as hubs lay it out: config.json, tokenizer.json and safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ....protocol.errors import SettingsError
from ..bundle import Bundle, Shape
from ..tokenizer import END_NAMES, Vocabulary

_READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def read_folder(folder: Path, dtype: torch.dtype) -> Bundle:
    """Read a model folder.

    Raises :class:`SettingsError` when something is missing or not supported.
    """
    config = _json(folder / "config.json")
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise SettingsError(f"{folder} holds no *.safetensors")
    shape = _shape(config, folder)
    files = {name: (file, name) for file in shards for name in _names(file)}

    def tensor(name: str) -> torch.Tensor:
        try:
            file, name = files.pop(name)
        except KeyError:
            raise SettingsError(f"{folder} has no tensor {name}") from None
        with safe_open(file, framework="pt", device="cpu") as opened:
            result: torch.Tensor = opened.get_tensor(name)
        return result.to(dtype)

    tensors = {"embedding": tensor("model.embed_tokens.weight"), "norm": tensor("model.norm.weight")}
    if not config.get("tie_word_embeddings", False):
        tensors["head"] = tensor("lm_head.weight")
    for layer in range(shape.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention, gated = f"{theirs}.self_attn", f"{theirs}.mlp"
        tensors |= {
            f"{ours}.norm_in": tensor(f"{theirs}.input_layernorm.weight"),
            f"{ours}.qkv": torch.cat([tensor(f"{attention}.{part}_proj.weight") for part in "qkv"]),
            f"{ours}.out": tensor(f"{attention}.o_proj.weight"),
            f"{ours}.norm_mid": tensor(f"{theirs}.post_attention_layernorm.weight"),
            f"{ours}.gate_up": torch.cat([tensor(f"{gated}.{part}_proj.weight") for part in ("gate", "up")]),
            f"{ours}.down": tensor(f"{gated}.down_proj.weight"),
        }
    # Old exports store the tied head and the rotary frequencies a second time.
    left = [name for name in files if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise SettingsError(f"{folder} has tensors that are not supported: {', '.join(sorted(left)[:5])}")
    return Bundle(shape=shape, tensors=tensors, vocabulary=_vocabulary(folder, config), digest=_digest(folder, shards))


def _shape(config: dict[str, Any], folder: Path) -> Shape:
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
            rope_base=config.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            norm_epsilon=config["rms_norm_eps"],
        )
    except KeyError as error:
        raise SettingsError(f"{folder}/config.json does not say its {error.args[0]}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise SettingsError(f"{folder}/config.json has no such shape: {error}") from None


def _vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    definition = (folder / "tokenizer.json").read_text("utf-8") if (folder / "tokenizer.json").exists() else ""
    if not definition:
        raise SettingsError(f"{folder} holds no tokenizer.json")
    extra = _json(folder / "tokenizer_config.json", required=False)
    generation = _json(folder / "generation_config.json", required=False)
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


def _json(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path} does not hold an object")
    return value


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return list(opened.keys())
    except Exception as error:  # the package has its own error, which derives from Exception only
        raise SettingsError(f"{file} cannot be read as safetensors: {error}") from error


def _digest(folder: Path, shards: list[Path]) -> str:
    """SHA-256 over the names and contents of every file that was read."""
    result = hashlib.sha256()
    for path in [*(folder / name for name in _READ), *shards]:
        if path.exists():
            with path.open("rb") as file:
                result.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return result.hexdigest()
