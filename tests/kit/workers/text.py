"""What is inside of a loaded task of text generation."""

from __future__ import annotations

from perdure.workers.text import Generate
from perdure.workers.text.engines.builtin import BuiltinEngine
from perdure.workers.text.engines.builtin.batch import TextBatch


def batch_of(task: Generate) -> TextBatch:
    """The requests in the built-in engine of a task."""
    engine = task._loaded()
    assert isinstance(engine, BuiltinEngine)
    return engine._loaded()
