"""The reference engine: Llama architectures, in shapes of which every row is the same to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from .....protocol.settings import Settings
from ....tasks.base import Step
from ....tasks.collectives import Collectives
from ...parameters import Parameters
from ..base import Promise, TextEngine

if TYPE_CHECKING:
    from ...generation import Generation
    from ...model.llama import Llama
    from .batch import TextBatch


class BuiltinEngine(TextEngine):
    """See :mod:`perdure.workers.text.model`. Loading proves that it computes exactly."""

    name = "builtin"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.promise = Promise(exact=True)
        self._group: Collectives | None = None
        self._llama: Llama | None = None
        self._batch: TextBatch | None = None
        self._facts: dict[str, Any] = {}
        self._threads = 0
        self._fingerprint = self._bits = ""

    def load(self, group: Collectives | None = None) -> None:
        """Read the model, ready the device, and prove that it computes exactly (in a group: in :meth:`meet`)."""
        # OpenMP's threads wait for each other by spinning. Where two workers share the cores they spin in each other's
        # way: passes of seconds were seen, against a fifth of one. Read when torch is loaded, so set before it is.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")

        import torch

        from ...arithmetic import sampler_bits
        from ...model.device import describe_device, prepare_device
        from ...model.key_memory import begin_measuring
        from ...model.llama import BUCKET, Llama
        from ...model.parallel import ParallelLlama, place
        from ...tokenizer import Tokenizer
        from ...weights.models import read

        settings = self.settings
        self._group = group
        device = prepare_device(place(settings, group) if group else settings)
        bundle = read(settings)
        if group:
            group.use(device)
            llama: Llama = ParallelLlama(bundle, device, settings.slots, group)
        else:
            llama = Llama(bundle, device, settings.slots)
        self.size = bundle.shape.vocabulary
        self.context = bundle.shape.context
        self.tokenizer = Tokenizer(bundle.vocabulary, self.size)
        begin_measuring(device)
        self._facts = describe_device(device) | {
            "model": bundle.digest,
            "dtype": settings.dtype,
            "rows": llama.rows,
            "chunk": llama.chunk,
            "block": llama.block,
            "bucket": BUCKET,
            "operators": llama.operators.name,
            "sampler": sampler_bits(torch.device("cpu")),  # where this engine samples
        }
        self._threads = torch.get_num_threads()
        self._llama = llama
        if group is None:
            self.meet()

    def meet(self) -> None:
        """An empty engine, and the proof of what it computes with."""
        from ...model.exactness import self_check
        from ...model.key_memory import KeyMemory
        from ...model.trace import Trace
        from .batch import TextBatch

        assert self._llama is not None
        self._bits = self_check(self._llama)
        facts = self._facts | {"bits": self._bits}
        self._fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        # All ranks compute the same rows: one of them says so.
        trace = Trace(self.settings.trace if self._group is None or self._group.rank == 0 else "")
        # The self-check has made the largest exact passes.
        memory = KeyMemory.measured(self._llama.device, self.settings.kv_memory)
        self._batch = TextBatch(self._llama, trace, self._fingerprint, self.settings.max_state, memory)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, tokenizer, template, dtype, canonical shapes, sampler, libraries, device and bits."""
        return self._fingerprint

    @property
    def generation(self) -> type[Generation]:
        """With keys."""
        from .cached import CachedGeneration

        return CachedGeneration

    def memory_needed(self, prompt: int, parameters: Parameters) -> int:
        """Bytes of the keys and values of the whole request: prompt and ``max_tokens``, for each of its answers."""
        return self._loaded().memory_needed(prompt, parameters)

    def memory_free(self) -> int | None:
        """What is left of ``PERDURE_KV_MEMORY`` and of the CUDA device; ``None`` on a CPU without that setting."""
        return self._loaded().memory_free()

    def admit(self, item: Generation) -> None:
        """Take a request in."""
        from .cached import CachedGeneration

        assert isinstance(item, CachedGeneration)
        if self._group is not None:
            # Each rank has the keys of its own heads, and a request one state: that of rank 0.
            item.forget_keys()
        self._loaded().admit(item)

    def step(self) -> list[Step]:
        """One forward pass."""
        import torch

        # Whatever else ran in this process may have changed what the bits depend on.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return self._loaded().step()

    def drop(self, request_id: str) -> None:
        """Forget a request and its keys; unknown ids are ignored."""
        if self._batch is not None:
            self._batch.drop(request_id)

    def probe(self) -> bool | None:
        """Whether the self-check gives the bits that it gave at the load; ``None`` on ranks, which it would take
        together.
        """
        if self._group or self._llama is None:
            return None
        from ...model.exactness import self_check

        return self_check(self._llama) == self._bits

    def __len__(self) -> int:
        return 0 if self._batch is None else len(self._batch)

    def __contains__(self, request_id: str) -> bool:
        return self._batch is not None and request_id in self._batch

    def _loaded(self) -> TextBatch:
        if self._batch is None:
            raise RuntimeError("load() comes first")
        return self._batch
