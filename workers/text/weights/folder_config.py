"""config.json of a model folder: which of the models that the engine runs it is, and how large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ....protocol.errors import SettingsError
from ..bundle import Shape

_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
"""By ``model_type``: what ``transformers`` takes where the file says nothing, and another type has something else."""


def read_shape(config: Mapping[str, Any], folder: Path) -> Shape:
    """The shape of a model. Raises :class:`SettingsError` for one that is not supported, naming what of it is not."""
    try:
        return _read(config, folder)
    except KeyError as error:
        raise SettingsError(f"{folder}/config.json does not say its {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise SettingsError(f"{folder}/config.json has no such shape: {error}") from None


def _read(config: Mapping[str, Any], folder: Path) -> Shape:
    kind = str(config.get("model_type"))
    if kind not in _DEFAULTS:
        raise _refused(
            folder,
            f"model_type {config.get('model_type')!r}",
            f"the built-in engine runs {', '.join(_DEFAULTS)}; for others make a task of transformers "
            "(perdure.workers.text.transformers.CausalLM)",
        )
    config = {**_DEFAULTS[kind], **config}
    if config.get("hidden_act", "silu") != "silu":
        raise _refused(folder, f"hidden_act {config['hidden_act']!r}")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(name) and (name, kind) != ("attention_bias", "qwen2"):  # which has it whatever this says
            raise _refused(folder, name)
    _check_window(config, folder, kind)
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    base, factors = _rotation(config, folder, head_width)
    return Shape(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        hidden=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=head_width,
        context=config["max_position_embeddings"],
        rope_base=base,
        norm_epsilon=config["rms_norm_eps"],
        rope_factors=factors,
        qkv_bias=kind == "qwen2",
        head_norms=kind == "qwen3",
    )


def _check_window(config: Mapping[str, Any], folder: Path, kind: str) -> None:
    """Attention sees the whole context. So does a window of that size."""
    window = config.get("sliding_window")
    if window is None or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        return
    if kind.startswith("qwen"):
        types = config.get("layer_types")
        first = config.get("max_window_layers", 28)
        slides = "sliding_attention" in types if types else config["num_hidden_layers"] > first
    else:
        slides = kind == "mistral"
    if slides and window < config["max_position_embeddings"]:
        raise _refused(
            folder,
            f"sliding_window {window}",
            f"it is less than the context of {config['max_position_embeddings']} tokens",
        )


def _rotation(config: Mapping[str, Any], folder: Path, head_width: int) -> tuple[float, tuple[float, ...]]:
    """The base of the rotary frequencies, and what each is divided by."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = any(isinstance(value, dict) for value in rope.values())
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if kind not in ("default", "llama3") or nested or part not in (None, 1.0):
        raise _refused(folder, "rope_scaling " + ("by layer" if nested else f"{kind!r} of {part or 1} of each head"))
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "default":
        return base, ()
    trained = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    trained = config.get("original_max_position_embeddings", trained)
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = (2 * math.pi * base ** (place / head_width) for place in range(0, head_width, 2))
    return base, tuple(_llama3(trained / wave, factor, low, high) for wave in waves)


def _llama3(turns: float, factor: float, low: float, high: float) -> float:
    """Llama 3's scaling of a frequency that makes so many turns in the context of the training.

    Slow ones are slowed by ``factor``, fast ones are not, and what is between them lies between.
    """
    if turns < low:
        return factor
    if turns > high:
        return 1.0
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def _refused(folder: Path, what: str, why: str = "") -> SettingsError:
    return SettingsError(f"{folder}: {what} is not supported" + (f": {why}" if why else ""))
