"""Tokenizers of the ``transformers`` package: a text becomes the ids that it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...protocol.errors import SettingsError
from .tokenizer import Tokenizer, Vocabulary


class HubTokenizer(Tokenizer):
    """A fast tokenizer of the package. The bytes of its tokens are told as those of any other."""

    def __init__(self, encoder: Any, ends: Sequence[int], size: int) -> None:
        """``encoder``: a ``PreTrainedTokenizerFast``; ``ends``: the ids that end a text; ``size``: how many tokens the
        model knows.

        Raises :class:`~perdure.protocol.errors.SettingsError` for a tokenizer whose tokens cannot be told as bytes.
        """
        if not getattr(encoder, "is_fast", False):
            raise SettingsError(
                f"{type(encoder).__name__} is not a fast tokenizer: the bytes of its tokens cannot be told; "
                "convert it, or give a factory that returns a PreTrainedTokenizerFast"
            )
        self.definition: str = encoder.backend_tokenizer.to_str()
        named = encoder.chat_template or ""
        templates = named if isinstance(named, dict) else {}
        vocabulary = Vocabulary(
            definition=self.definition,
            ends=tuple(sorted(ends)),
            template="" if templates else named,
            templates=templates,
            specials=encoder.special_tokens_map,
        )
        super().__init__(vocabulary, size)
        self._encoder = encoder

    def encode(self, text: str, context: int | None = None) -> list[int]:
        """The ids of a raw prompt, as the tokenizer's own call gives them. Raises as :meth:`check_length`."""
        self.check_length(text, context, "prompt")
        return [int(token) for token in self._encoder(text)["input_ids"]]


def end_tokens(encoder: Any, *configurations: Any) -> tuple[int, ...]:
    """The tokens that end a text, as a tokenizer and a model's configurations (``generation_config``, …) name them."""
    ends: set[int] = set()
    for owner in (*configurations, encoder):
        value = getattr(owner, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or ())
    return tuple(sorted(ends))
