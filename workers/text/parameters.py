"""What one generation is asked to do: the payload's fields, checked and completed.

Both sides call :func:`complete`: the producer at submit, where a mistake costs nothing, and the
worker at admission, because a producer that knows only the dotted path stores what it was given.
No model is needed, and no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from ...protocol.errors import InvalidRequest
from .checks import checked

_OFF: Final[dict[str, Any]] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "min_tokens": 0,
    "n": 1,
    "kv": False,
    "skip_special_tokens": True,
    "tools": [],
    "documents": [],
    "chat_template_kwargs": {},
}
"""What changes nothing is not stored: a worker that does not know these fields yet still takes the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One generation's parameters, all of them known.

    ``temperature`` 0 is greedy. ``min_p`` 0, ``top_k`` 0 and ``top_p`` 1 filter nothing. Exactly one of
    ``prompt``, ``messages`` and ``token_ids`` is not ``None``. ``repetition_penalty`` 1, the other
    penalties 0 and an empty ``logit_bias`` (pairs of token and bias, by token) change nothing; their
    formulas are those of :meth:`~perdure.workers.text.sampler.SampledRow.adjust`. ``logprobs`` is ``None``, or how
    many tokens' log-probabilities come with the chosen token's own
    (:func:`~perdure.workers.text.sampler.score`). ``n`` is how many answers are asked for.
    ``exact`` demands an answer that is the same after a resume; with ``False`` the ordinary shapes will do, which are
    faster; ``None`` takes the best that the pool has.
    With ``kv`` the prompt's keys are checkpointed. Without ``skip_special_tokens`` the text has special tokens, too.
    ``template`` is what the chat template has beside the messages, as
    :meth:`~perdure.workers.text.tokenizer.Tokenizer.encode_chat` takes it; ``structured_outputs`` the answer's form.
    """

    prompt: str | None
    messages: tuple[dict[str, Any], ...] | None
    token_ids: tuple[int, ...] | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    logprobs: int | None
    min_tokens: int
    n: int
    exact: bool | None
    kv: bool
    skip_special_tokens: bool = True
    template: Mapping[str, Any] = field(default_factory=dict)
    structured_outputs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, payload: Any, request_id: str) -> Parameters:
        """The parameters of a stored payload.

        A payload without a seed (stored by a producer that did not have this task at hand) takes
        one from the request's id, so that each execution of the request draws the same.
        Raises :class:`InvalidRequest` naming the field.
        """
        fields = checked(payload)
        seed = fields["seed"]
        if seed is None:
            seed = int.from_bytes(hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1
        messages, token_ids = fields["messages"], fields["token_ids"]
        return cls(
            prompt=fields["prompt"],
            messages=None if messages is None else tuple(messages),
            token_ids=None if token_ids is None else tuple(token_ids),
            max_tokens=fields["max_tokens"],
            temperature=fields["temperature"],
            top_p=fields["top_p"],
            top_k=fields["top_k"],
            min_p=fields["min_p"],
            seed=seed,
            stop=tuple(fields["stop"]),
            repetition_penalty=fields["repetition_penalty"],
            presence_penalty=fields["presence_penalty"],
            frequency_penalty=fields["frequency_penalty"],
            logit_bias=tuple((int(token), bias) for token, bias in fields["logit_bias"].items()),
            logprobs=fields["logprobs"],
            min_tokens=fields["min_tokens"],
            n=fields["n"],
            exact=fields["exact"],
            kv=fields["kv"],
            skip_special_tokens=fields["skip_special_tokens"],
            template={
                "tools": fields["tools"] or None,
                "documents": fields["documents"] or None,
                "template_kwargs": fields["chat_template_kwargs"],
            },
            structured_outputs=fields["structured_outputs"],
        )

    def sampling(self) -> dict[str, Any]:
        """The fields of a payload that say how tokens are chosen, as plain values."""
        names = (
            "max_tokens", "min_tokens", "temperature", "min_p", "top_k", "top_p", "seed", "repetition_penalty",
            "presence_penalty", "frequency_penalty", "structured_outputs",
        )  # fmt: skip
        biases = {str(token): bias for token, bias in self.logit_bias}
        return {**{name: getattr(self, name) for name in names}, "logit_bias": biases}

    def sibling(self, index: int) -> Parameters:
        """Those of one of the ``n`` answers: its own seed. The first one's is the request's."""
        if index == 0:
            return self
        digest = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        return dataclasses.replace(self, seed=int.from_bytes(digest[:8], "big") >> 1)

    def asks(self, name: str) -> bool:
        """Whether more is asked for with this field than what its default gives."""
        if name == "exact":
            return bool(self.exact)
        return bool(getattr(self, name) != _OFF.get(name))

    @property
    def source(self) -> str:
        """The field that the prompt came in, for messages."""
        if self.prompt is not None:
            return "prompt"
        return "token_ids" if self.messages is None else "messages"

    def check_vocabulary(self, size: int) -> None:
        """Compare what names tokens with a model that knows ``size`` of them.

        Raises :class:`InvalidRequest` naming the field.
        """
        for place, token in enumerate(self.token_ids or ()):
            if token >= size:
                raise InvalidRequest(
                    f"token_ids[{place}] is {token}, but the model knows the tokens 0 to {size - 1}", field="token_ids"
                )
        for token, _ in self.logit_bias:
            if token >= size:
                raise InvalidRequest(
                    f"logit_bias names the token {token}, but the model knows the tokens 0 to {size - 1}",
                    field="logit_bias",
                )

    def check_prompt(self, prompt: Sequence[int], size: int, context: int) -> None:
        """Compare a prompt's tokens, and what is to follow them, with a model of ``size`` tokens and its context.

        Raises :class:`InvalidRequest` naming the field.
        """
        count = len(prompt)
        if count == 0:
            raise InvalidRequest(f"{self.source} holds no token for this model", field=self.source)
        if count >= context:
            raise InvalidRequest(
                f"{self.source} has {count} tokens, but the model's context is {context} including the answer",
                field=self.source,
            )
        if count + self.max_tokens > context:
            raise InvalidRequest(
                f"max_tokens is {self.max_tokens}, but after {count} tokens of {self.source} the "
                f"model's context of {context} has room for {context - count}",
                field="max_tokens",
            )
        # A tokenizer may have been given tokens that its model has no weights for.
        if unknown := [token for token in prompt if not 0 <= token < size]:
            raise InvalidRequest(
                f"{self.source} has the token {unknown[0]}, but the model knows the tokens 0 to {size - 1}: its "
                "tokenizer has more tokens than its weights",
                field=self.source,
            )

    def check_result(self, size: int, limit: int) -> None:
        """Compare what a result of all ``max_tokens`` would take with the most bytes that one may have.

        Counted are the tokens and log-probabilities; the text comes on top. Raises :class:`InvalidRequest`.
        """
        token = len(msgpack.packb(size - 1))
        each = token
        if self.logprobs is not None:
            top = min(self.logprobs, size)
            named = {"token": 0, "logprob": 0.5, **({"top_logprobs": [[0, 0.5]] * top} if top else {})}
            each += len(msgpack.packb(named)) + (1 + top) * (token - 1)
        whole = self.n * self.max_tokens * each
        if whole > limit:
            raise InvalidRequest(
                f"max_tokens is {self.max_tokens:,}: {_times(self.n)}with {each} bytes a token the result would have "
                f"{whole:,}, more than the limit of {limit:,} (PERDURE_MAX_PAYLOAD); ask for fewer tokens, answers "
                "or logprobs",
                field="max_tokens",
            )


def check_size(payload: Any, context: int) -> None:
    """Refuse a payload that cannot fit into a context of so many tokens, before anything of it is looked at closely.

    Raises :class:`InvalidRequest` naming the field.
    """
    if not isinstance(payload, Mapping):
        return
    for name, what in (("token_ids", "tokens"), ("messages", "messages")):
        value = payload.get(name)
        # No message is less than a token.
        if isinstance(value, list | tuple) and len(value) >= context:
            raise InvalidRequest(
                f"{name} has {len(value)} {what}, but the model's context is {context} including the answer", field=name
            )
    most = payload.get("max_tokens")
    if isinstance(most, int) and most >= context:
        raise InvalidRequest(
            f"max_tokens is {most}, but the model's context is {context} including the prompt", field="max_tokens"
        )


def complete(payload: Any) -> dict[str, Any]:
    """The payload to store: its defaults filled in, and a seed drawn if none was given.

    Penalties, biases and the like that change nothing are left out.

    Raises :class:`InvalidRequest` naming the field.
    """
    fields = checked(payload)
    if fields["seed"] is None:
        fields["seed"] = secrets.randbits(63)
    return {name: value for name, value in fields.items() if value is not None and value != _OFF.get(name)}


def _times(n: int) -> str:
    return f"for {n} answers " if n > 1 else ""
