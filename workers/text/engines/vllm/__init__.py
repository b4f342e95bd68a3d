"""vLLM, in this process: its scheduler, its kernels and its batches, under Perdure's sampler and leases."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .....protocol.errors import InvalidRequest, SettingsError
from .....protocol.settings import Settings
from ....tasks.base import Step
from ....tasks.collectives import Collectives
from ....tasks.unfit import Unfit
from ...parameters import Parameters
from ..base import Promise, TextEngine, steps_of

if TYPE_CHECKING:
    from ...generation import Generation, Sibling

TESTED: Final = "0.32"
"""The release whose names are used here."""

_MISSING: Final = "the package vllm is needed for this engine: pip install 'perdure[vllm]'"

_ENVIRONMENT: Final = {
    # The engine's core in this process: it ends with it, and a core that was killed is no wait for ever.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The other runner has another interface of processors.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Workers share cores: they must not all be bound to the first ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What vLLM reads when it is imported, unless it is set already."""

REFUSED: Final = {
    "logits_processors": "the durable sampler is one, and what others change is not known after a crash",
    "speculative_config": "vLLM samples speculated tokens without logits processors, so that answers could not be "
    "continued",
    "tensor_parallel_size": "one process is supported so far",
    "pipeline_parallel_size": "one process is supported so far",
    "data_parallel_size": "run so many workers instead",
    "model": "PERDURE_MODEL says it",
    "max_num_seqs": "PERDURE_SLOTS says it",
}
"""Arguments of vLLM's that are refused, and why."""


class VllmEngine(TextEngine):
    """vLLM has rows for all answers of ``PERDURE_SLOTS`` requests; all else is as it has it, or as
    ``PERDURE_ENGINE_ARGS`` says.
    """

    name = "vllm"
    takes_arguments = True
    refused: ClassVar[Mapping[str, str]] = {"kv": "its keys stay where they are; a resume computes them again"}

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.promise = Promise(exact=False)
        self._engine: Any = None
        self._requests: dict[str, Generation] = {}
        self._rows: dict[str, tuple[Generation, Sibling]] = {}
        """By the name that vLLM knows: each answer is a request of its own there."""
        self._waiting: set[str] = set()
        """The names of those that have had no token yet, and so perhaps no block."""
        self._facts: dict[str, Any] = {}
        self._meaning: dict[str, str] = {}
        self._known: list[int] = []
        self._block_bytes = 0

    def load(self, group: Collectives | None = None) -> None:
        """Start vLLM's engine, and measure what it can promise."""
        if group is not None:
            raise SettingsError("PERDURE_RANKS is for the built-in engine; this one runs in one process")
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if self.settings.threads:
            os.environ["OMP_NUM_THREADS"] = str(self.settings.threads)
        try:
            import vllm
        except ImportError as error:
            raise SettingsError(f"{_MISSING} ({error})") from error
        from .loading import facts_of, meaning_of, start
        from .processor import tokenizer_of

        self._engine = start(self.settings)
        config = self._engine.vllm_config
        self.size = int(config.model_config.get_vocab_size())
        self.context = int(config.model_config.max_model_len)
        self.tokenizer = tokenizer = tokenizer_of(config.model_config)
        self._facts = facts_of(self._engine) | {"vllm": vllm.__version__}
        self._meaning = meaning_of(config.model_config, tokenizer)
        core = self._engine.engine_core.engine_core
        cache = core.scheduler.kv_cache_config
        self._block_bytes = sum(int(tensor.size) for tensor in cache.kv_cache_tensors) // max(1, cache.num_blocks)
        self.meet()

    def meet(self) -> None:
        """Compute some tokens again, cut and uncut, alone and in company, and compare logits."""
        from .check import measure

        self.promise, self._known = measure(self)

    def fingerprint(self) -> str:
        """SHA-256 of the model's files, its tokenizer and the sampler; where it is exact, of all that decides a bit."""
        facts = {"meaning": self._meaning} | ({"arithmetic": self._facts} if self.promise.exact else {})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def memory_needed(self, prompt: int, parameters: Parameters) -> int:
        """Bytes of the blocks of the prompt, and of one more to begin with, for each answer. vLLM takes the others when
        they are needed, and has a request wait for them.
        """
        return parameters.n * self._block_bytes * (2 + prompt // self._block_size)

    def memory_free(self) -> int:
        """Bytes of the blocks that are free, less what those take that have been admitted and not begun."""
        pool = self._engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        promised = sum(2 + len(self._rows[name][0].prompt) // self._block_size for name in self._waiting)
        return int(self._block_bytes * max(0, pool.get_num_free_blocks() - promised))

    @property
    def _block_size(self) -> int:
        return int(self._engine.vllm_config.cache_config.block_size)

    def admit(self, item: Generation) -> None:
        """Give vLLM each answer that has not ended: its prompt, and the tokens so far behind it."""
        from vllm.exceptions import VLLMClientError

        self._requests[item.id] = item
        try:
            for sibling in item.running():
                self._add(item, sibling)
        except (VLLMClientError, ValueError) as error:
            self.drop(item.id)
            raise InvalidRequest(f"vLLM refuses it: {error}") from error

    def step(self) -> list[Step]:
        """One step of vLLM's scheduler: prefills and tokens of several requests."""
        from vllm.v1.engine.exceptions import EngineDeadError

        from .processor import DurableSampler

        steps = [step for item in list(self._requests.values()) if item.ended for step in self._leave(item, [])]
        if steps:
            # The last execution died between the last output and the result: there is nothing to compute.
            return steps
        try:
            outputs = self._engine.step()
        except EngineDeadError as error:
            raise Unfit(f"vLLM's engine has died: {error}") from error
        moved: dict[str, Generation] = {}
        for output in outputs:
            item, sibling = self._rows.get(output.request_id, (None, None))
            if item is None or sibling is None:
                continue  # dropped while it was computed
            moved[item.id] = item
            self._waiting.discard(output.request_id)
            completion = output.outputs[0]
            scores = DurableSampler.scores.get(output.request_id, {})
            for token in completion.token_ids:
                index = len(sibling.generated) + len(sibling.arrived)
                sibling.arrived.append((int(token), scores.pop(index, {})))
            if output.finished:
                self._forget(output.request_id)
        for item in moved.values():
            steps += self._leave(item, list(item.arrive()))
        return steps

    def drop(self, request_id: str) -> None:
        """Forget a request, and have vLLM forget it; unknown ids are ignored."""
        item = self._requests.pop(request_id, None)
        if item is not None:
            self._abort(item, item.siblings)

    def probe(self) -> bool | None:
        """Whether it says again what it said at load."""
        from .check import reference

        return reference(self) == self._known

    def close(self) -> None:
        """End vLLM's engine."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def _add(self, item: Generation, sibling: Sibling) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        from .processor import extra_args

        given = sibling.parameters
        name = _name(item, sibling)
        params = SamplingParams(
            temperature=0,
            # Where an answer ends is found by its transcript, which knows its stop texts, too.
            max_tokens=given.max_tokens - len(sibling.transcript.tokens),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args(given, len(item.prompt), self.tokenizer.ends, name),
        )
        self._rows[name] = item, sibling
        self._waiting.add(name)
        self._engine.add_request(name, tokens_input([*item.prompt, *sibling.generated]), params)

    def _abort(self, item: Generation, siblings: Iterable[Sibling]) -> None:
        """Have vLLM forget some of the answers, if it still has them."""
        names = [name for name in (_name(item, sibling) for sibling in siblings) if name in self._rows]
        for name in names:
            self._forget(name)
        if names:
            self._engine.abort_request(names)

    def _forget(self, name: str) -> None:
        from .processor import DurableSampler

        del self._rows[name]
        self._waiting.discard(name)
        DurableSampler.scores.pop(name, None)

    def _leave(self, item: Generation, outputs: list[dict[str, Any] | None]) -> list[Step]:
        """What a request puts out; it leaves if it has ended, or if what vLLM has put out are no tokens."""
        from .processor import DurableSampler

        names = {_name(item, sibling) for sibling in item.siblings}
        if unsound := names & DurableSampler.unsound:
            DurableSampler.unsound -= unsound
            self.drop(item.id)
            error = ArithmeticError(f"the model's logits for output {len(item.siblings[0].generated)} are not finite")
            return [Step(request_id=item.id, error=error)]
        steps = steps_of(item, outputs)
        if item.ended:
            self.drop(item.id)
        else:  # one that has met its stop text, beside others that go on
            self._abort(item, [sibling for sibling in item.siblings if sibling.transcript.finish_reason])
        return steps


def _name(item: Generation, sibling: Sibling) -> str:
    return f"{item.execution or item.id}:{sibling.index}"
