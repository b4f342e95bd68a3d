"""One request in an engine: a prompt, and the answers that are generated to it.

A request with ``n`` answers has n *siblings*, each a generation of its own, with its own seed.

Their outputs come in one order, whoever else uses the engine: the first token of each, then the
second of each, and so on. So the outputs of a restart are those of the first run, and a checkpoint
may fall between any two of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ..tasks.base import Request
from .grammar import Grammars
from .parameters import Parameters
from .sampler import SampledRow
from .tokenizer import Tokenizer
from .transcript import Transcript


@dataclass(slots=True, eq=False)
class Sibling:
    """One answer.

    ``generated`` are its tokens so far, those that end it included. Where log-probabilities are asked for, ``scores``
    has those of each. ``row`` is what the next one is chosen by.
    """

    index: int
    parameters: Parameters
    transcript: Transcript
    generated: list[int]
    row: SampledRow
    scores: list[dict[str, Any]] = field(default_factory=list)
    arrived: deque[tuple[int, dict[str, Any]]] = field(default_factory=deque)
    """Tokens that are chosen, with their scores, and wait for their turn among the other answers' outputs."""

    def take(self, output: Mapping[str, Any]) -> None:
        """Take in an output of an earlier execution; what comes after the end is ignored."""
        if self.transcript.finish_reason:
            return
        self.transcript.add(output["token"])
        self.generated.append(output["token"])
        if self.parameters.logprobs is not None:
            self.scores.append({name: output[name] for name in ("logprob", "top_logprobs") if name in output})

    def put(self, token: int, scored: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take in the next token, with its log-probabilities; its output, or ``None`` where it has none."""
        self.generated.append(token)
        if scored:
            self.scores.append(dict(scored))
        before = len(self.transcript.tokens)
        text = self.transcript.add(token)
        # The token that ends a text is no output of its own, except to carry text that was held back.
        if self.transcript.finish_reason and len(self.transcript.tokens) == before and not text:
            return None
        return {"token": token, "text": text, **scored}

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
    """One request in an engine. An engine that keeps more of each may derive from it, and from its siblings."""

    id: str
    execution: str
    prompt: list[int]
    parameters: Parameters
    siblings: list[Any]  # of sibling_type
    state: Any = None

    sibling_type: ClassVar[type[Sibling]] = Sibling

    @classmethod
    def of(
        cls,
        request: Request,
        prompt: Sequence[int],
        parameters: Parameters,
        tokenizer: Tokenizer,
        grammars: Grammars | None = None,
    ) -> Self:
        """A request that goes on from its outputs so far, in order, and its state.

        ``grammars``: of the engine, for one whose answer has a form. Raises :class:`ValueError` for outputs of
        something else, and :class:`~perdure.protocol.errors.InvalidRequest` for a form that is none.
        """
        pieces = tokenizer.pieces if parameters.skip_special_tokens else tokenizer.whole_pieces
        known = known_outputs(request, len(pieces), parameters)
        # The text of a special token is not in the answer's, so that it would never be found there.
        specials = tokenizer.specials if parameters.skip_special_tokens else {}
        stops = {specials[text] for text in parameters.stop if text in specials}
        siblings = []
        for index in range(parameters.n):
            own = parameters.sibling(index)
            transcript = Transcript(
                pieces, tokenizer.ends, own.stop, own.max_tokens, len(prompt), own.min_tokens, stops
            )
            generated: list[int] = []
            grammar = grammars.matcher(own.structured_outputs) if grammars and own.structured_outputs else None
            row = SampledRow(own, prompt, generated, tokenizer.ends, grammar)
            siblings.append(cls.sibling_type(index, own, transcript, generated, row))
        for output in known:
            siblings[output.get("index", 0)].take(output)
        return cls(request.id, request.execution, list(prompt), parameters, siblings, state=request.state)

    @property
    def ended(self) -> bool:
        """True when every sibling is at its end."""
        return all(item.transcript.finish_reason for item in self.siblings)

    def running(self) -> list[Any]:
        """The siblings that have not ended, in the order in which their next outputs come."""
        items = [item for item in self.siblings if not item.transcript.finish_reason]
        return sorted(items, key=lambda item: (len(item.generated), item.index))

    def put(self, sibling: Sibling, token: int, scored: Mapping[str, Any]) -> dict[str, Any] | None:
        """As :meth:`Sibling.put`; an output of several answers says whose it is."""
        output = sibling.put(token, scored)
        return output if output is None or len(self.siblings) == 1 else {"index": sibling.index, **output}

    def arrive(self) -> Iterator[dict[str, Any] | None]:
        """The outputs whose turn it is, of tokens that have arrived; ``None`` for a token that has none."""
        while (running := self.running()) and running[0].arrived:
            yield self.put(running[0], *running[0].arrived.popleft())

    def notes(self) -> dict[str, Any]:
        """What the result says beside its answers."""
        return {"exact": False} if self.parameters.exact is False else {}

    def result(self) -> dict[str, Any]:
        """What the request ends with."""
        results = [sibling.result() for sibling in self.siblings]
        if len(results) == 1:
            return {**results[0], **self.notes()}
        usages = [result.pop("usage") for result in results]
        return {
            "choices": [{"index": index, **result} for index, result in enumerate(results)],
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": sum(usage["completion_tokens"] for usage in usages),
            },
            **self.notes(),
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
