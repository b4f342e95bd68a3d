"""What is inside of a loaded task of text generation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tokenizers
import torch

from perdure.workers.text import Generate
from perdure.workers.text.engines.builtin import BuiltinEngine
from perdure.workers.text.engines.builtin.batch import TextBatch
from perdure.workers.text.weights.export import write
from perdure.workers.text.weights.tiny import tiny


def batch_of(task: Generate) -> TextBatch:
    """The requests in the built-in engine of a task."""
    engine = task._loaded()
    assert isinstance(engine, BuiltinEngine)
    return engine._loaded()


def write_tiny(folder: Path) -> str:
    """The tiny model with a token that ends a text, as a folder that every engine reads."""
    bundle = tiny(torch.float32)
    end = bundle.vocabulary.specials["eos_token"]
    identifier = tokenizers.Tokenizer.from_str(bundle.vocabulary.definition).token_to_id(end)
    assert identifier is not None
    write(dataclasses.replace(bundle, vocabulary=dataclasses.replace(bundle.vocabulary, ends=(identifier,))), folder)
    return str(folder)
