"""One request in the engine: a prompt, and the answers that are generated to it.

A request with ``n`` answers has n *siblings*. They share the prompt's keys, each takes a copy once
the prompt is computed, and from there on each is a generation of its own, with its own seed.

Their outputs come in one order, whoever else uses the engine: the first token of each, then the
second of each, and so on. So the outputs of a restart are those of the first run, and a checkpoint
may fall between any two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import Tensor

from ..tasks.base import Request
from .parameters import Parameters
from .sampler import adjust, choose, score
from .transcript import Transcript


@dataclass(slots=True, eq=False)
class Sibling:
    """One answer.

    ``cached`` counts the positions whose keys are computed. Below its last known token it is in
    replay; at it, in decode. Where log-probabilities are asked for, ``scores`` has those of each
    generated token.
    """

    index: int
    parameters: Parameters
    transcript: Transcript
    keys: Tensor | None = None
    cached: int = 0
    generated: list[int] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    def take(self, output: Mapping[str, Any]) -> None:
        """Take in an output of an earlier execution; what comes after the end is ignored."""
        if self.transcript.finish_reason:
            return
        self.transcript.add(output["token"])
        self.generated.append(output["token"])
        if self.parameters.logprobs is not None:
            self.scores.append({name: output[name] for name in ("logprob", "top_logprobs") if name in output})

    def result(self) -> dict[str, Any]:
        """What this answer ends with."""
        result = self.transcript.result()
        if self.parameters.logprobs is not None:
            # A token that ended the text is the last of those generated, and none of the result's.
            pairs = zip(self.transcript.tokens, self.scores, strict=False)
            result["logprobs"] = [{"token": token, **scored} for token, scored in pairs]
        return result


@dataclass(slots=True, eq=False)
class Generation:
    """One request in the engine.

    ``prefilled`` counts the positions of its prompt whose keys are computed; ``kept`` those that are
    in its state, ``None`` before there was one to write.
    """

    id: str
    execution: str
    prompt: list[int]
    parameters: Parameters
    siblings: list[Sibling]
    keys: Tensor | None = None
    prefilled: int = 0
    state: Any = None
    kept: int | None = None
    prompt_ids: NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_ids = numpy.unique(numpy.array(self.prompt, dtype=numpy.int64))

    @classmethod
    def of(
        cls,
        request_id: str,
        execution: str,
        prompt: Sequence[int],
        parameters: Parameters,
        transcripts: Iterable[Transcript],
        known: Iterable[Mapping[str, Any]],
        state: Any = None,
    ) -> Generation:
        """A request with a transcript for each of its siblings; its outputs so far, in order, and its state."""
        siblings = [
            Sibling(index, parameters.sibling(index), transcript) for index, transcript in enumerate(transcripts)
        ]
        for output in known:
            siblings[output.get("index", 0)].take(output)
        return cls(request_id, execution, list(prompt), parameters, siblings, state=state)

    @property
    def ended(self) -> bool:
        """True when every sibling is at its end."""
        return all(item.transcript.finish_reason for item in self.siblings)

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys that it has now."""
        tensors = [self.keys, *(sibling.keys for sibling in self.siblings)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    @property
    def in_prefill(self) -> bool:
        return self.prefilled < len(self.prompt)

    def running(self) -> list[Sibling]:
        """The siblings that have not ended, in the order in which their next outputs come."""
        items = [item for item in self.siblings if not item.transcript.finish_reason]
        return sorted(items, key=lambda item: (len(item.generated), item.index))

    def pending(self, sibling: Sibling) -> int:
        """How many known tokens of a sibling have no keys yet; at least 1 after prefill."""
        return len(self.prompt) + len(sibling.generated) - sibling.cached

    def share(self) -> None:
        """Give every sibling the keys of the prompt, which is computed."""
        keys, self.keys = self.keys, None
        assert keys is not None
        for place, sibling in enumerate(self.running()):
            # A copy has the same bits and the same strides.
            sibling.keys = keys.clone() if place else keys
            sibling.cached = len(self.prompt)

    def advance(self, sibling: Sibling, logits: NDArray[Any]) -> dict[str, Any] | None:
        """Choose a sibling's next token from a row of logits; its output, or ``None`` where it has none.

        Raises :class:`ArithmeticError` for logits that are no numbers.
        """
        parameters, transcript = sibling.parameters, sibling.transcript
        adjusted = adjust(logits, parameters, self.prompt_ids, sibling.generated, transcript.ends)
        token = choose(adjusted, parameters, len(sibling.generated))
        sibling.generated.append(token)
        scored = {} if parameters.logprobs is None else score(logits, token, parameters.logprobs)
        if scored:
            sibling.scores.append(scored)
        before = len(transcript.tokens)
        text = transcript.add(token)
        if transcript.finish_reason:
            sibling.keys = None
            # The token that ends a text is no output of its own, except to carry text that was held back.
            if len(transcript.tokens) == before and not text:
                return None
        index = {"index": sibling.index} if len(self.siblings) > 1 else {}
        return {**index, "token": token, "text": text, **scored}

    def result(self) -> dict[str, Any]:
        """What the request ends with."""
        results = [sibling.result() for sibling in self.siblings]
        notes: dict[str, Any] = {} if self.parameters.exact else {"exact": False}
        if self.parameters.kv:
            notes["kv_tokens"] = self.kept or 0
        if len(results) == 1:
            return results[0] | notes
        usages = [result.pop("usage") for result in results]
        return {
            "choices": [{"index": index, **result} for index, result in enumerate(results)],
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": sum(usage["completion_tokens"] for usage in usages),
            },
            **notes,
        }


def known_outputs(request: Request, vocabulary: int, parameters: Parameters) -> list[dict[str, Any]]:
    """The outputs so far. Raises :class:`ValueError` for outputs of something else."""
    logprobs, siblings = parameters.logprobs, parameters.n
    top = 0 if logprobs is None else min(logprobs, vocabulary)
    for place, output in enumerate(request.outputs):
        if not (
            isinstance(output, dict)
            and _is_below(output.get("token"), vocabulary)
            and (siblings == 1 or _is_below(output.get("index"), siblings))
            and (logprobs is None or isinstance(output.get("logprob"), float))
            and (not top or _is_top(output.get("top_logprobs"), top, vocabulary))
        ):
            raise ValueError(f"output {place} of request {request.id} is not one of text generation: {output!r:.60}")
    return request.outputs


def _is_below(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_top(value: Any, count: int, vocabulary: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(
            isinstance(pair, list) and len(pair) == 2 and _is_below(pair[0], vocabulary) and isinstance(pair[1], float)
            for pair in value
        )
    )
