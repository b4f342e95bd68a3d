"""Model folders as ``transformers`` saves them, small and random, and what it makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import torch
import transformers
from transformers.utils.logging import tqdm_lib

from tests.kit.workers.models import TOKENS, byte_level

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
tqdm_lib.tqdm.monitor_interval = 0  # a thread of its own otherwise, which outlives the test

COMMON: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def save_model(folder: Path, kind: str = "llama", shard: str = "1GB", **changes: Any) -> Any:
    """A random model in ``folder``, with a tokenizer beside it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Ones and zeros, as a new model has them, would hide a norm or a bias that is left out.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.12)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path, definition: str = "", **config: Any) -> None:
    """tokenizer.json, the usual one if none is given, and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(definition or byte_level().to_str())
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def load_model(folder: Path) -> Any:
    """What ``transformers`` reads from it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def load_tokenizer(folder: Path) -> Any:
    """What ``transformers`` reads from it."""
    return transformers.AutoTokenizer.from_pretrained(folder)


def make_tokenizer(inner: tokenizers.Tokenizer, **config: Any) -> Any:
    """What ``transformers`` makes of a tokenizer that lies in no folder."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **config)
