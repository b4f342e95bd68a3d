"""The durable sampler inside of vLLM: a logits processor of its V1 model runner.

vLLM has random state, counts penalties and follows grammars from the first token that it generates itself, so a prompt
that ends with tokens of an earlier execution is continued otherwise. Here a request runs greedily, as far as vLLM
knows, and names in ``extra_args["perdure"]`` how it is to be sampled and how many tokens of its prompt are the
prompt: what stands behind them is output. This replaces its row of logits by one in which only the chosen token is
left.

Also for servers: ``vllm serve … --logits-processors perdure.workers.text.engines.vllm.processor:DurableSampler``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from .....protocol.errors import InvalidRequest
from ...grammar import Grammars
from ...hub import HubTokenizer, end_tokens
from ...parameters import Parameters
from ...sampler import SampledRow, choose, score

NAME: Final = "perdure"

_FIELDS: Final = frozenset({"origin", "ends", "name", "scored"})


def extra_args(parameters: Parameters, origin: int, ends: Iterable[int], name: str = "") -> dict[str, Any]:
    """What a request says of itself whose first ``origin`` prompt tokens are its prompt; by ``name`` it is told apart
    in this process.
    """
    beside = {"origin": origin, "ends": list(ends), "name": name, "scored": parameters.logprobs}
    return {NAME: {**beside, **parameters.sampling()}}


@dataclass(slots=True)
class Tokens(Sequence[int]):
    """The output so far: what stands behind the prompt, and what vLLM has generated, a list that grows."""

    known: list[int]
    live: list[int]

    def __len__(self) -> int:
        return len(self.known) + len(self.live)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if start >= len(self.known):  # what came since the last look
                return self.live[start - len(self.known) : stop - len(self.known) : step]
        return [*self.known, *self.live][place]


def tokenizer_of(model: Any) -> HubTokenizer:
    """The tokenizer of a ``ModelConfig``, and the tokens that end a text as its files name them."""
    encoder = cached_tokenizer_from_config(model)
    generation = SimpleNamespace(**model.try_get_generation_config())
    return HubTokenizer(encoder, end_tokens(encoder, generation, model.hf_text_config), model.get_vocab_size())


class DurableSampler(LogitsProcessor):
    """Rows of :mod:`perdure.workers.text.sampler` at the places of vLLM's batch; other requests' rows stay as they
    are.
    """

    watched: ClassVar[dict[str, Callable[[int, Tensor], None]]] = {}
    """By name: called with the index of an output and the model's own logits of it."""
    scores: ClassVar[dict[str, dict[int, dict[str, Any]]]] = {}
    """By name and index of an output: its log-probabilities, where they are asked for. vLLM's own are compiled at their
    first use, for seconds, and not at all without a C++ compiler.
    """
    unsound: ClassVar[set[str]] = set()
    """The names of those whose logits were no numbers: what vLLM puts out for them is no token."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._config = vllm_config
        self._rows: dict[int, tuple[SampledRow, str, int | None]] = {}

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raises ``VLLMValidationError``, which vLLM answers as the client's mistake."""
        given = (params.extra_args or {}).get(NAME)
        if given is None:
            return
        if not isinstance(given, Mapping):
            raise VLLMValidationError(f"{NAME} must be a mapping, not {type(given).__name__}")
        if params.temperature != 0:
            raise VLLMValidationError(f"temperature must be 0 beside {NAME}, which has one of its own")
        if not isinstance(given.get("origin"), int):
            raise VLLMValidationError(f"{NAME}.origin must say how many tokens of the prompt are the prompt")
        try:
            _parameters(given)
        except InvalidRequest as error:
            raise VLLMValidationError(f"{NAME}: {error}") from error

    def is_argmax_invariant(self) -> bool:
        """It decides what is the largest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the batch: removed, added, moved, in this order."""
        if batch_update is None:
            return
        rows = self._rows
        for place in batch_update.removed:
            rows.pop(place, None)
        for place, params, prompt, output in batch_update.added:
            rows.pop(place, None)
            given = (params.extra_args or {}).get(NAME)
            if given is not None:
                row = self._row(given, prompt or [], output)
                rows[place] = row, given.get("name", ""), given.get("scored")
        for source, target, direction in batch_update.moved:
            one, other = rows.pop(source, None), rows.pop(target, None)
            if one is not None:
                rows[target] = one
            if other is not None and direction == MoveDirectionality.SWAP:
                rows[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Choose a token for each of our rows. ``logits``: float32 [rows, vocabulary], changed in place."""
        places = [place for place in sorted(self._rows) if place < len(logits)]
        if not places:
            return logits
        rows = [self._rows[place][0] for place in places]
        names = [self._rows[place][1] for place in places]
        ours = logits if len(places) == len(logits) else logits[places]
        for name, row, values in zip(names, rows, ours, strict=True):
            if (watch := self.watched.get(name)) is not None:
                watch(len(row.output), values)
        tokens = choose(ours, rows)
        self.unsound.update(name for name, token in zip(names, tokens, strict=True) if token < 0)
        for place, values, token in zip(places, ours, tokens, strict=True):
            row, name, scored = self._rows[place]
            if scored is not None and token >= 0:
                # Chosen first: nothing has changed these logits yet.
                found = score(values.cpu().numpy(), token, scored)
                self.scores.setdefault(name, {})[len(row.output)] = found
        chosen = torch.tensor(tokens, device=logits.device).clamp_(min=0).unsqueeze(1)
        logits[places] = torch.full_like(ours, -torch.inf).scatter_(1, chosen, 0)
        return logits

    @cached_property
    def _grammars(self) -> Grammars:
        model = self._config.model_config
        return Grammars(tokenizer_of(model), model.get_vocab_size())

    def _row(self, given: Mapping[str, Any], prompt: list[int], output: list[int]) -> SampledRow:
        origin, parameters = given["origin"], _parameters(given)
        form = parameters.structured_outputs
        grammar = self._grammars.matcher(form) if form else None
        tokens = Tokens(prompt[origin:], output)
        return SampledRow(parameters, prompt[:origin], tokens, given.get("ends") or (), grammar)


def _parameters(given: Mapping[str, Any]) -> Parameters:
    fields = {name: value for name, value in given.items() if name not in _FIELDS}
    return Parameters.of({"token_ids": [0], **fields}, "")
