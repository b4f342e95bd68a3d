"""Tokenizers of the ``transformers`` package: text and conversations become the ids that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...protocol.errors import InvalidRequest, SettingsError
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
        super().__init__(Vocabulary(definition=self.definition, ends=tuple(sorted(ends))), size)
        self._encoder = encoder

    def encode(self, text: str, context: int | None = None) -> list[int]:
        """The ids of a raw prompt, as the tokenizer's own call gives them. Raises as :meth:`check_length`."""
        self.check_length(text, context, "prompt")
        return [int(token) for token in self._encoder(text)["input_ids"]]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], context: int | None = None, **given: Any) -> list[int]:
        """The ids of a conversation, up to where the assistant answers; ``given`` goes to the model's template.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` when the model has no chat template or it refuses the
        messages, and as :meth:`check_length`.
        """
        if not self._encoder.chat_template:
            raise InvalidRequest("this model has no chat template; use prompt instead of messages", field="messages")
        from jinja2.exceptions import TemplateError

        try:
            text = self._encoder.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **given
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        self.check_length(text, context, "messages")
        return [int(token) for token in self._encoder(text, add_special_tokens=False)["input_ids"]]


def end_tokens(encoder: Any, *configurations: Any) -> tuple[int, ...]:
    """The tokens that end a text, as a tokenizer and a model's configurations (``generation_config``, …) name them."""
    ends: set[int] = set()
    for owner in (*configurations, encoder):
        value = getattr(owner, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or ())
    return tuple(sorted(ends))
