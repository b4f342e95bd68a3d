"""Continuous batching: many generations, one forward pass a step.

Each step is one pass in one of the two canonical shapes (:mod:`...model.llama`), so it is short, and what a
pass computes for a request depends on nothing but the request. Requests that did without exactness
have ordinary shapes while they are among themselves; beside exact ones they sit in the rows that are
computed anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

import numpy
import torch
from numpy.typing import NDArray

from ....tasks.base import RAISED, Raised, Step
from ....tasks.collectives import CollectiveFailed
from ...model.key_memory import KeyMemory
from ...model.kv import held, restore, room, save
from ...model.llama import Llama, Run
from ...model.trace import Row, Trace
from ...parameters import Parameters
from ...sampler import choose, score
from ..base import steps_of
from .cached import CachedGeneration, CachedSibling

LOG: Final = logging.getLogger("rq.worker")

PREFILLS: Final = 2
"""Chunks of prompts between two decode passes, or one block: a long prompt slows the others, and stops nobody."""


class TextBatch:
    """The requests in flight.

    1. :meth:`admit` takes one in, with the outputs it already has.
    2. :meth:`step` runs one pass: a chunk of one prompt, or a row for each request past its prompt.
       Rows left over go round to those that can use more: siblings, and known tokens of resumed requests.
    3. A request leaves with the step that carries its result or error, or by :meth:`drop`.
    """

    def __init__(
        self, llama: Llama, trace: Trace, fingerprint: str = "", max_state: int = 0, memory: KeyMemory | None = None
    ) -> None:
        """``fingerprint`` of what computes here; ``max_state``: most bytes of a state; ``memory``: of its keys."""
        self._memory = memory or KeyMemory(llama.device)
        self._fingerprint = fingerprint
        self._max_state = max_state
        self._llama = llama
        self._trace = trace
        self._requests: dict[str, CachedGeneration] = {}
        self._computed = 0
        """Rows of prompts, and of known tokens, since the last decode pass."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def memory_needed(self, prompt: int, parameters: Parameters) -> int:
        """Bytes of the keys of a request with a prompt of so many tokens, once all its answers have theirs."""
        return parameters.n * self._llama.key_bytes(prompt + parameters.max_tokens)

    def memory_free(self) -> int | None:
        """Bytes free for the keys of further requests; ``None`` if there is no limit."""
        items = [item for item in self._requests.values() if not item.ended]
        promised = sum(self.memory_needed(len(item.prompt), item.parameters) for item in items)
        return self._memory.free(promised, sum(item.key_bytes for item in items))

    def admit(self, item: CachedGeneration) -> None:
        """Take a request in."""
        if not item.ended:
            item.keys = self._llama.keys(len(item.prompt) + item.parameters.max_tokens)
        self._restore(item)
        self._requests[item.id] = item

    def drop(self, request_id: str) -> None:
        """Forget a request and its keys; unknown ids are ignored."""
        self._requests.pop(request_id, None)

    def step(self) -> list[Step]:
        """One pass. A request that moved without a new token has a step without an output."""
        ended = [item for item in self._requests.values() if item.ended]
        if ended:
            # The last execution died between the last output and the result: there is nothing to compute.
            return [self._end(item) for item in ended]
        waiting = [item for item in self._requests.values() if item.in_prefill or self._behind(item)]
        running = [item for item in self._requests.values() if item not in waiting]
        if waiting and (not running or self._computed < PREFILLS * self._llama.chunk):
            return self._alone(waiting[0])
        self._computed = 0
        return self._decode(running) if running else []

    def _alone(self, item: CachedGeneration) -> list[Step]:
        """A pass for one request only: what it raises is that one's, and no other is concerned."""
        try:
            return self._prefill(item) if item.in_prefill else self._catch_up(item)
        except CollectiveFailed:
            raise  # that is the group's, whoever's pass it was
        except RAISED as error:
            self.drop(item.id)
            return [Raised(request_id=item.id, error=error)]

    def _prefill(self, item: CachedGeneration) -> list[Step]:
        start = item.prefilled
        exact = item.exact
        end = self._llama.chunk_at(start, len(item.prompt))[1] if exact else start + self._llama.block
        chunk = item.prompt[start:end]
        assert item.keys is not None
        last = (self._llama.prefill if exact else self._llama.extend)(item.keys, start, chunk)
        item.prefilled += len(chunk)
        # A short one takes nearly as long as a full one.
        self._computed += max(len(chunk), self._llama.chunk)
        rows: list[Row] = [(item.id, item.execution, start + place, "prefill") for place in range(len(chunk))]
        steps: list[Step] = []
        if not item.in_prefill:
            state = self._save(item)
            item.share()
            fresh = [sibling for sibling in item.running() if not sibling.generated]
            if fresh:
                logits = self._llama.logits(last, exact=exact)[0]
                rows += [self._row(item, sibling, 0, "decode") for sibling in fresh]
                steps = self._sample(item, [(sibling, logits) for sibling in fresh])
            if state is not None and not any(step.ends for step in steps):
                # First, so that it is in the same checkpoint as the first outputs, or in an earlier one.
                steps.insert(0, Step(request_id=item.id, state=state))
        self._trace.write(rows)
        return steps or [Step(request_id=item.id)]

    def _save(self, item: CachedGeneration) -> Any:
        """The prompt's keys as a state, once, where that was asked for; else ``None``."""
        if not item.parameters.kv or item.kept is not None:
            return None
        assert item.keys is not None
        item.kept = room(item.keys, len(item.prompt), self._llama.chunk, self._max_state)
        if item.kept < len(item.prompt):
            LOG.warning(
                "the keys of request %s's prompt are more than PERDURE_MAX_STATE (%d bytes); "
                "a resume will find those of %d of its %d tokens, and compute the rest",
                item.id,
                self._max_state,
                item.kept,
                len(item.prompt),
            )
        return save(item.keys, item.kept, self._fingerprint) if item.kept else None

    def _restore(self, item: CachedGeneration) -> None:
        """Take the prompt's keys from the state, if it has them; the tokens that are left are computed."""
        state, item.state = item.state, None
        if item.ended:
            item.kept = held(state)
            return
        if item.parameters.kv and state is not None:
            assert item.keys is not None
            item.kept = restore(state, item.keys, self._fingerprint) or None
            if item.kept is None:
                LOG.warning("the state of request %s is none for this model; its prompt is computed again", item.id)
                return
            # The row of the prompt's last token is not stored. Whoever needs it computes its chunk again.
            complete = item.kept == len(item.prompt) and all(sibling.generated for sibling in item.running())
            missing = min(item.kept, len(item.prompt) - 1)
            item.prefilled = item.kept if complete else self._llama.chunk_at(missing, len(item.prompt))[0]
            if complete:
                item.share()

    def _behind(self, item: CachedGeneration) -> CachedSibling | None:
        """A sibling whose known tokens are put back many at once: where that need not be exact."""
        if item.exact:
            return None
        return next((sibling for sibling in item.running() if item.pending(sibling) > 1), None)

    def _catch_up(self, item: CachedGeneration) -> list[Step]:
        sibling = self._behind(item)
        assert sibling is not None
        assert sibling.keys is not None
        first = sibling.cached - len(item.prompt)
        tokens = sibling.generated[first:-1][: self._llama.block]
        self._llama.extend(sibling.keys, sibling.cached, tokens)
        sibling.cached += len(tokens)
        self._computed += max(len(tokens), self._llama.chunk)
        self._trace.write([self._row(item, sibling, first + place, "replay") for place in range(len(tokens))])
        return [Step(request_id=item.id)]

    def _decode(self, items: Sequence[CachedGeneration]) -> list[Step]:
        runs: list[Run] = []
        rows: list[Row] = []
        sampled: list[tuple[CachedGeneration, list[tuple[CachedSibling, int]]]] = []
        for item, budget in zip(items, self._budgets(items), strict=True):
            ready: list[tuple[CachedSibling, int]] = []
            in_order = True
            for sibling in item.running():
                pending = item.pending(sibling)
                # Outputs have an order. Behind one that is not sampled in this pass, none is: they may only replay.
                count = min(pending if in_order else pending - 1, budget)
                newest = in_order and count == pending
                in_order = newest
                if not count:
                    continue
                budget -= count
                first = sibling.cached - len(item.prompt)
                assert sibling.keys is not None
                runs.append(Run(sibling.keys, sibling.cached, sibling.generated[first : first + count]))
                rows += [self._row(item, sibling, first + place, "replay") for place in range(count - newest)]
                if newest:
                    ready.append((sibling, len(rows)))
                    rows.append(self._row(item, sibling, len(sibling.generated), "decode"))
                sibling.cached += count
            sampled.append((item, ready))
        exact = any(item.exact for item in items)
        x = self._llama.decode(runs, exact=exact)
        logits = self._llama.logits(x, exact=exact) if any(ready for _, ready in sampled) else None
        steps: list[Step] = []
        for item, ready in sampled:
            if logits is None or not ready:
                steps.append(Step(request_id=item.id))
            else:
                steps += self._sample(item, [(sibling, logits[row]) for sibling, row in ready])
        self._trace.write(rows)
        return steps

    def _budgets(self, items: Sequence[CachedGeneration]) -> list[int]:
        """How many rows of a decode pass each request gets: one, and of the rest equal shares of what it can use."""
        wanted = [sum(item.pending(sibling) for sibling in item.running()) for item in items]
        budgets = [0] * len(items)
        spare = self._llama.rows
        while spare and budgets != wanted:
            for place in range(len(items)):
                if spare and budgets[place] < wanted[place]:
                    budgets[place] += 1
                    spare -= 1
        return budgets

    def _row(self, item: CachedGeneration, sibling: CachedSibling, place: int, kind: str) -> Row:
        return item.id, item.execution, place * len(item.siblings) + sibling.index, kind

    def _sample(self, item: CachedGeneration, ready: Sequence[tuple[CachedSibling, NDArray[Any]]]) -> list[Step]:
        """The next token of each sibling, and with it its output; with the last, the request's result or failure.

        For one request: what its grammar or its penalties raise is no other one's.
        """
        steps: list[Step] = []
        try:
            rows = torch.from_numpy(numpy.stack([logits for _, logits in ready]))
            tokens = choose(rows, [sibling.row for sibling, _ in ready])
            for (sibling, logits), token in zip(ready, tokens, strict=True):
                if token < 0:
                    raise ArithmeticError(f"the model's logits for output {len(sibling.generated)} are not finite")
                asked = item.parameters.logprobs
                scored = {} if asked is None else score(logits, token, asked)
                steps += steps_of(item, [item.put(sibling, token, scored)])
        except ArithmeticError as error:
            steps.append(Step(request_id=item.id, error=error))
        except RAISED as error:
            steps.append(Raised(request_id=item.id, error=error))
        if steps[-1].ends:
            self.drop(item.id)
        return steps

    def _end(self, item: CachedGeneration) -> Step:
        self.drop(item.id)
        return Step(request_id=item.id, result=item.result())
