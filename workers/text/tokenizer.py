"""Text to token ids, and token ids to bytes.

Ids become *bytes*, not text: a character may span several tokens, and only the transcript knows
when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Final

import tokenizers

from ...protocol.errors import InvalidRequest, SettingsError
from .templates import DEFAULT, ChatTemplates

PIECE: Final = 32_768
"""Characters of a long text that are counted at a time: some 15 MB of the tokenizer's memory, some 50 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """All that a model says about its tokens, as plain values that can be stored.

    ``definition`` is the JSON of the ``tokenizers`` package. ``ends`` are the ids that end a text,
    ``prefix`` the ids put in front of a raw prompt; with ``post_process`` the definition says what else is put around
    it. ``template`` is the chat template that is taken by default, and may be empty; ``templates`` are those that have
    a name. ``specials`` are the special tokens that templates know by a name (``bos_token``).
    """

    definition: str
    ends: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    post_process: bool = False
    template: str = ""
    templates: Mapping[str, str] = field(default_factory=dict)
    specials: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        values: dict[str, Any] = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("ends", "prefix")})


class Tokenizer:
    """A vocabulary at work."""

    def __init__(self, vocabulary: Vocabulary, size: int) -> None:
        """``size``: how many tokens the model knows; ids that no text has stand for no bytes.

        Raises :class:`SettingsError` for a tokenizer whose tokens cannot be told as bytes, or that does not belong to
        the model.
        """
        for token in (*vocabulary.ends, *vocabulary.prefix):
            if not isinstance(token, int) or isinstance(token, bool):
                raise SettingsError(f"the model names a token that is no whole number: {token!r:.60}")
        if unknown := [token for token in vocabulary.prefix if not 0 <= token < size]:
            raise SettingsError(f"the model begins each prompt with {unknown[0]}, but knows the tokens 0 to {size - 1}")
        self._vocabulary = vocabulary
        try:
            self._inner = tokenizers.Tokenizer.from_str(vocabulary.definition)
        except Exception as error:  # the package raises nothing narrower
            raise SettingsError(f"the model's tokenizer cannot be read: {error}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        default = {DEFAULT: vocabulary.template} if vocabulary.template else {}
        self._templates = ChatTemplates(default | dict(vocabulary.templates), vocabulary.specials)
        # -1 is how some models say that there is none.
        self.ends = frozenset(token for token in vocabulary.ends if 0 <= token < size)
        self.pieces: list[bytes] = _pieces(self._inner, vocabulary.definition, size)
        """The bytes of every token; special tokens have none."""
        self.specials = {
            token.content: place
            for place, token in self._inner.get_added_tokens_decoder().items()
            if token.special and place < size
        }
        """The ids of special tokens, by their text."""
        self.dated = any("strftime_now" in text for text in (*vocabulary.templates.values(), vocabulary.template))
        """Whether a template may write the date."""

    @cached_property
    def whole_pieces(self) -> list[bytes]:
        """The bytes of every token, those of special tokens as well."""
        pieces = list(self.pieces)
        for text, place in self.specials.items():
            pieces[place] = text.encode()
        return pieces

    def encode(self, text: str, context: int | None = None) -> list[int]:
        """The ids of a raw prompt, as the model wants it to begin. Raises as :meth:`check_length` if ``context`` is
        given.
        """
        self.check_length(text, context, "prompt")
        ids = self._inner.encode(text, add_special_tokens=self._vocabulary.post_process).ids
        return [*self._vocabulary.prefix, *ids]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        context: int | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> list[int]:
        """The ids of a conversation, up to where the assistant answers; the arguments are those of
        :meth:`~perdure.workers.text.templates.ChatTemplates.render`.

        A template may write the date. Who resumes a request gives the ``now`` of its first run: another date is
        another prompt.

        Raises :class:`InvalidRequest` when the model has no chat template or it refuses the messages, and as
        :meth:`check_length` if ``context`` is given.
        """
        text = self._templates.render(
            messages, tools=tools, documents=documents, template_kwargs=template_kwargs, now=now
        )
        self.check_length(text, context, "messages")
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def check_length(self, text: str, context: int | None, field: str) -> None:
        """Refuse a text that is much too long for a context of so many tokens, before all of it is tokenised.

        What takes seconds and gigabytes as a whole is counted in pieces, as far as needed. A piece may be cut within a
        token, so only twice the context is too much here; what passes is counted exactly afterwards.

        Raises :class:`InvalidRequest`.
        """
        if context is None or len(text) <= max(PIECE, context // 4):
            return  # no character is more than four tokens
        tokens = 0
        for start in range(0, len(text), PIECE):
            tokens += len(self._inner.encode(text[start : start + PIECE], add_special_tokens=False))
            if tokens >= 2 * context:
                raise InvalidRequest(
                    f"{field} has {len(text):,} characters, and the first {min(start + PIECE, len(text)):,} of them "
                    f"are {tokens:,} tokens, but the model's context is {context} including the answer",
                    field=field,
                )


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write for the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _pieces(inner: tokenizers.Tokenizer, definition: str, size: int) -> list[bytes]:
    """The bytes of every id."""
    decoder = json.loads(definition).get("decoder") or {}
    parts = {part["type"]: part for part in [decoder, *decoder.get("decoders", [])] if "type" in part}
    if "ByteLevel" in parts:
        alphabet = byte_alphabet()

        def piece(token: str) -> bytes:
            return bytes(alphabet[character] for character in token)
    elif "ByteFallback" in parts:

        def piece(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
    else:
        names = ", ".join(parts) or "none"
        raise SettingsError(f"the model's tokenizer has a decoder that is not supported ({names})")
    pieces = [b""] * size
    added = inner.get_added_tokens_decoder()
    for token, place in inner.get_vocab(with_added_tokens=True).items():
        if place >= size:
            continue
        if place in added:
            pieces[place] = b"" if added[place].special else token.encode()
            continue
        try:
            pieces[place] = piece(token)
        except (KeyError, ValueError):
            raise SettingsError(f"the model's tokenizer has a token that stands for no bytes: {token!r}") from None
    return pieces
