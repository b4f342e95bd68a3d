"""What may come next in an answer that has a form: a JSON schema, a regular expression, a choice, a grammar.

Matched by ``xgrammar``, which vLLM uses as well. Nothing is stored of it: a resumed answer's tokens are put through a
new matcher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...protocol.errors import InvalidRequest
from .sampler import Grammar
from .tokenizer import Tokenizer

FIELD: Final = "structured_outputs"

_MISSING: Final = "needs the package xgrammar on the worker: pip install 'perdure[grammar]'"

_CACHE: Final = 256 * 1024 * 1024
"""Bytes of compiled grammars that are kept."""


class Grammars:
    """Those of one vocabulary, compiled once each."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """``size``: how many logits a row has.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` where there is no xgrammar, or no token ends a text.
        """
        try:
            import xgrammar
        except ImportError as error:
            raise InvalidRequest(f"{FIELD} {_MISSING} ({error})", FIELD) from error
        if not tokenizer.ends:
            raise InvalidRequest(f"{FIELD}: no token ends a text of this model, so that its form could not end", FIELD)
        self._size = size
        info = xgrammar.TokenizerInfo(list(tokenizer.pieces), vocab_size=size, stop_token_ids=sorted(tokenizer.ends))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE)
        # No JSON needs one, and none may stand in its strings; rules for the length of a string let them through.
        self._controls = [place for place, piece in enumerate(tokenizer.pieces) if piece and min(piece) < 0x20]

    def matcher(self, asked: Mapping[str, Any]) -> Grammar:
        """A matcher that is at the beginning of an answer; ``asked``: as :func:`~.checks.checked` gives it.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` for what xgrammar does not take.
        """
        import xgrammar

        ((kind, value),) = asked.items()
        try:
            if kind == "json":
                compiled = self._compiler.compile_json_schema(value if isinstance(value, str) else json.dumps(value))
            elif kind == "json_object":
                compiled = self._compiler.compile_builtin_json_grammar()
            elif kind == "regex":
                compiled = self._compiler.compile_regex(value)
            else:
                choices = [json.dumps(text, ensure_ascii=False) for text in value] if kind == "choice" else []
                text = f"root ::= {' | '.join(choices)}" if choices else value
                compiled = self._compiler.compile_grammar(text)
            matched = Matched(
                xgrammar.GrammarMatcher(compiled), self._size, self._controls if kind.startswith("json") else ()
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise InvalidRequest(f"{FIELD}.{kind} cannot be used: {error}", FIELD) from error
        first = torch.zeros(self._size)
        matched.mask(first, ())
        if not first.isfinite().any():
            raise InvalidRequest(f"{FIELD}.{kind} cannot be used: no text has this form", FIELD)
        return matched


class Matched:
    """One answer's."""

    def __init__(self, matcher: Any, size: int, never: Sequence[int] = ()) -> None:
        """``never``: tokens that may not come anywhere."""
        import xgrammar

        self._matcher = matcher
        self._never = list(never)
        self._seen = 0
        self._bits = xgrammar.allocate_token_bitmask(1, size)
        self._apply = xgrammar.apply_token_bitmask_inplace

    def mask(self, values: Tensor, output: Sequence[int]) -> None:
        """Set the logits [vocabulary] of what may not follow to -∞; of all tokens, if ``output`` is not of the form."""
        for token in output[self._seen :]:
            if not self._matcher.is_terminated() and not self._matcher.accept_token(token):
                values.fill_(-float("inf"))
                return
        self._seen = len(output)
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(self._bits, 0)
            self._apply(values.unsqueeze(0), self._bits.to(values.device))
            values[self._never] = -float("inf")
