"""Continuous batching: many generations, one forward pass a step.

Each step is one pass in one of the two canonical shapes (:mod:`.llama`), so it is short, and what a
pass computes for a request depends on nothing but the request. Knows no Redis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy
from numpy.typing import NDArray
from torch import Tensor

from ..tasks import Step
from .llama import Llama, Run
from .parameters import Parameters
from .sampler import adjust, choose, score
from .trace import Row, Trace
from .transcript import Transcript

PREFILLS: Final = 2
"""Prefill passes between two decode passes, at most: a long prompt slows the others, and stops nobody."""


@dataclass(slots=True)
class Sequenced:
    """One request in the engine.

    ``cached`` counts the positions whose keys are computed. Below the prompt's length the request
    is in prefill; below its last known token, in replay; at it, in decode. Where log-probabilities
    are asked for, ``scores`` has those of each generated token.
    """

    id: str
    execution: str
    prompt: list[int]
    parameters: Parameters
    transcript: Transcript
    keys: Tensor | None = None
    cached: int = 0
    generated: list[int] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    prompt_ids: NDArray[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_ids = numpy.unique(numpy.array(self.prompt, dtype=numpy.int64))

    @property
    def in_prefill(self) -> bool:
        return self.cached < len(self.prompt)

    @property
    def pending(self) -> int:
        """How many known generated tokens have no keys yet; at least 1 after prefill."""
        return len(self.prompt) + len(self.generated) - self.cached


class Engine:
    """The requests in flight.

    1. :meth:`admit` takes one in, with the outputs it already has.
    2. :meth:`step` runs one pass: a chunk of one prompt, or a row for each request past its prompt.
       Rows left over replay known tokens of resumed requests.
    3. A request leaves with the step that carries its result or error, or by :meth:`drop`.
    """

    def __init__(self, llama: Llama, trace: Trace) -> None:
        self._llama = llama
        self._trace = trace
        self._requests: dict[str, Sequenced] = {}
        self._prefills = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def admit(
        self,
        request_id: str,
        execution: str,
        prompt: Sequence[int],
        parameters: Parameters,
        transcript: Transcript,
        known: Iterable[Mapping[str, Any]],
    ) -> None:
        """Take a request in. ``known`` are its outputs so far, in order."""
        tokens, scores = [], []
        for output in known:
            if transcript.finish_reason:
                break
            transcript.add(output["token"])
            tokens.append(output["token"])
            if parameters.logprobs is not None:
                scores.append({name: output[name] for name in ("logprob", "top_logprobs") if name in output})
        keys = None if transcript.finish_reason else self._llama.keys(len(prompt) + parameters.max_tokens)
        self._requests[request_id] = Sequenced(
            request_id, execution, list(prompt), parameters, transcript, keys, generated=tokens, scores=scores
        )

    def drop(self, request_id: str) -> None:
        """Forget a request and its keys; unknown ids are ignored."""
        self._requests.pop(request_id, None)

    def step(self) -> list[Step]:
        """One pass. A request that moved without a new token has a step without an output."""
        ended = [item for item in self._requests.values() if item.transcript.finish_reason]
        if ended:
            # The last execution died between the last output and the result: there is nothing to compute.
            return [self._end(item) for item in ended]
        waiting = [item for item in self._requests.values() if item.in_prefill]
        running = [item for item in self._requests.values() if not item.in_prefill]
        if waiting and (not running or self._prefills < PREFILLS):
            self._prefills += 1
            return self._prefill(waiting[0])
        self._prefills = 0
        return self._decode(running) if running else []

    def _prefill(self, item: Sequenced) -> list[Step]:
        start = item.cached
        chunk = item.prompt[start : start + self._llama.chunk]
        assert item.keys is not None
        last = self._llama.prefill(item.keys, start, chunk)
        item.cached += len(chunk)
        rows: list[Row] = [(item.id, item.execution, start + place, "prefill") for place in range(len(chunk))]
        if item.in_prefill or item.generated:
            self._trace.write(rows)
            return [Step(request_id=item.id)]
        rows.append((item.id, item.execution, 0, "decode"))
        steps = [self._sample(item, self._llama.logits(last)[0])]
        self._trace.write(rows)
        return steps

    def _decode(self, items: Sequence[Sequenced]) -> list[Step]:
        spare = self._llama.rows - len(items)
        runs: list[Run] = []
        rows: list[Row] = []
        sampled: dict[str, int] = {}
        for item in items:
            # One row is everybody's; the rest go to those who have known tokens to put back.
            count = min(item.pending, 1 + spare)
            spare -= count - 1
            first = item.cached - len(item.prompt)
            assert item.keys is not None
            runs.append(Run(item.keys, item.cached, item.generated[first : first + count]))
            newest = count == item.pending
            rows += [(item.id, item.execution, first + place, "replay") for place in range(count - newest)]
            if newest:
                sampled[item.id] = len(rows)
                rows.append((item.id, item.execution, len(item.generated), "decode"))
            item.cached += count
        x = self._llama.decode(runs)
        logits = self._llama.logits(x) if sampled else None
        steps = []
        for item in items:
            if logits is None or item.id not in sampled:
                steps.append(Step(request_id=item.id))
            else:
                steps.append(self._sample(item, logits[sampled[item.id]]))
        self._trace.write(rows)
        return steps

    def _sample(self, item: Sequenced, logits: NDArray[Any]) -> Step:
        """The request's next token, and with it its output, its result, or its failure."""
        try:
            adjusted = adjust(logits, item.parameters, item.prompt_ids, item.generated, item.transcript.ends)
            token = choose(adjusted, item.parameters, len(item.generated))
        except ArithmeticError as error:
            self.drop(item.id)
            return Step(request_id=item.id, error=error)
        item.generated.append(token)
        scored = {} if item.parameters.logprobs is None else score(logits, token, item.parameters.logprobs)
        if scored:
            item.scores.append(scored)
        before = len(item.transcript.tokens)
        text = item.transcript.add(token)
        # The token that ends a text is no output of its own, except to carry text that was held back.
        output = len(item.transcript.tokens) > before or text
        if item.transcript.finish_reason:
            return self._end(item, {"token": token, "text": text, **scored} if output else None)
        return Step(request_id=item.id, output={"token": token, "text": text, **scored})

    def _end(self, item: Sequenced, output: dict[str, Any] | None = None) -> Step:
        self.drop(item.id)
        result = item.transcript.result()
        if item.parameters.logprobs is not None:
            # A token that ended the text is the last of those generated, and none of the result's.
            pairs = zip(item.transcript.tokens, item.scores, strict=False)
            result["logprobs"] = [{"token": token, **scored} for token, scored in pairs]
        if output is None:
            return Step(request_id=item.id, result=result)
        return Step(request_id=item.id, output=output, result=result)
