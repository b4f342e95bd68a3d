"""A tiny model of another architecture than the built-in engine's, with random weights that are always the same."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch

from perdure.protocol.settings import Settings
from perdure.workers.text.transformers import CausalLM
from perdure.workers.text.weights.tiny import tiny


def gpt2() -> tuple[Any, Any]:
    """A GPT-2 of two layers, and a tokenizer of one token a byte."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=260, n_positions=512, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
        )
    )
    vocabulary = tiny(torch.float32).vocabulary
    inner = tokenizers.Tokenizer.from_str(vocabulary.definition)
    encoder = PreTrainedTokenizerFast(tokenizer_object=inner)
    encoder.chat_template = vocabulary.template
    return model, encoder


generate = CausalLM(gpt2, settings=Settings(device="cpu", threads=1, slots=4))
