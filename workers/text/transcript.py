"""The text of a generation, piece by piece, as a function of its tokens alone.

Nothing of this is stored: a resumed request feeds its tokens through a new transcript and stands
where the old one stood. Two things are held back until it is clear what they are: the bytes of an
unfinished character, and text that may be the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Any


class Transcript:
    """One request's tokens and text.

    1. :meth:`add` takes each token and returns the text that it sets free.
    2. It ends with a stop token, a stop string (which is cut off) or the last token allowed; then
       ``finish_reason`` is set and :meth:`result` is complete.

    The pieces returned add up to the result's text, always. Stop strings are looked for in the text
    of the tokens from number ``min_tokens`` on; nothing is held back for them before.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        ends: Collection[int],
        stops: Sequence[str],
        max_tokens: int,
        prompt_tokens: int,
        min_tokens: int = 0,
        stop_ids: Collection[int] = (),
    ) -> None:
        """``pieces``: the bytes of every token; ``ends``: the tokens that end a text; ``stop_ids``: those that do so
        from number ``min_tokens`` on.
        """
        self.tokens: list[int] = []
        self.finish_reason = ""
        self._pieces = pieces
        self.ends = ends
        self._stops = stops
        self._stop_ids = stop_ids
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._prompt_tokens = prompt_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._text: list[str] = []

    def add(self, token: int) -> str:
        """Take the next token; return the text that can be shown now, which may be empty.

        A token that ends the text is not kept among the tokens.
        """
        if token in self.ends or (token in self._stop_ids and len(self.tokens) >= self._min_tokens):
            self.finish_reason = "stop"
            text = self._decoder.decode(b"", final=True)
        else:
            self.tokens.append(token)
            if len(self.tokens) >= self._max_tokens:
                self.finish_reason = "length"
            text = self._decoder.decode(self._pieces[token], final=bool(self.finish_reason))
        return self._release(text)

    def result(self) -> dict[str, Any]:
        """What the request ends with."""
        return {
            "text": "".join(self._text),
            "token_ids": list(self.tokens),
            "finish_reason": self.finish_reason,
            "usage": {"prompt_tokens": self._prompt_tokens, "completion_tokens": len(self.tokens)},
        }

    def _release(self, text: str) -> str:
        text = self._held + text
        stops = self._stops if len(self.tokens) >= self._min_tokens else ()
        found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        if found:
            self.finish_reason = "stop"
            text = text[: min(found)]
        held = 0 if self.finish_reason else self._beginning(text, stops)
        self._held = text[len(text) - held :]
        shown = text[: len(text) - held]
        self._text.append(shown)
        return shown

    def _beginning(self, text: str, stops: Sequence[str]) -> int:
        """How many characters at the end of ``text`` may be the beginning of a stop string."""
        longest = 0
        for stop in stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
