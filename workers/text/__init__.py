"""Text generation whose answer after a crash is, byte for byte, the answer without one.

``client.submit("perdure.workers.text.generate", {"prompt": "…", "max_tokens": 64})``. Importing this
imports neither torch nor a model: a producer that only checks its payloads stays light.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from ...protocol.settings import Settings
from ..tasks.base import BatchTask, Request, Step
from .parameters import Parameters, check_size, complete

if TYPE_CHECKING:
    from .engine import TextEngine
    from .model.llama import Llama
    from .tokenizer import Tokenizer

__all__ = ["Generate", "generate"]


class Generate(BatchTask):
    """Generate text with a Llama-architecture model.

    The payload has a ``prompt``, or ``messages`` for the model's chat template, or ``token_ids``,
    to which nothing is added; and may have ``max_tokens`` (128), ``min_tokens`` (0), ``temperature``
    (0: greedy), ``top_p``, ``top_k``, ``seed``, ``stop``, ``repetition_penalty`` (1),
    ``presence_penalty`` (0), ``frequency_penalty`` (0), ``logit_bias`` (token id to −100…100),
    ``logprobs``, ``n`` (1), ``exact`` (true) and ``kv`` (false). Penalties and biases are functions of the tokens so
    far (formulas:
    :func:`~perdure.workers.text.sampler.adjust`).

    Each output is ``{"token": id, "text": str}``; the texts add up to the result's. The result is
    ``{"text", "token_ids", "finish_reason": "stop" | "length", "usage": {"prompt_tokens",
    "completion_tokens"}}``. A token that ends the text is neither counted nor, as a rule, an output;
    it is one only when text was held back until then. The outputs are all that a later execution
    needs: there is no state, unless ``kv`` asks for one.

    With ``logprobs`` (true, or 0 to 20) each output has a ``"logprob"`` too, with more than 0
    ``"top_logprobs"`` as well, ``[[token, logprob], …]``, and the result has ``"logprobs"``, a mapping
    for each of its tokens. They are the model's own
    (:func:`~perdure.workers.text.sampler.score`), and the same to the last bit after a resume.

    With an ``n`` above 1 there are so many answers, side by side. Outputs have an ``"index"`` too, and
    come in the order of the tokens, of equal ones in that of the answers; the result is ``{"choices":
    [{"index", "text", "token_ids", "finish_reason", …}], "usage"}``. The first answer is that of n = 1;
    the others' seeds are derived from its (:meth:`~perdure.workers.text.parameters.Parameters.sibling`).

    With ``exact`` false the ordinary shapes are used where no exact request is in the engine: faster,
    and an answer after a crash may go on with other tokens than it would have had. The result then has
    ``"exact": False``. What was put out is kept in any case; a restart from zero that comes out
    differently is told to the reader as that of any other task.

    With ``kv`` the keys and values of the prompt are the request's state once they are computed, as many
    of them as ``PERDURE_MAX_STATE`` has room for, and a resume reads them instead of computing them. The
    answer is the same to the last bit. The result has ``"kv_tokens"``, for how many tokens of the prompt. Where the
    model is on several ranks, ``kv`` is ignored.

    A step that put a prompt or known tokens into the cache has neither output nor result.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """``settings``: those of the environment, read when first needed, unless given."""
        self._given = settings
        self._engine: TextEngine | None = None
        self._tokenizer: Tokenizer | None = None
        self._context = 0
        self._threads = 0
        self._fingerprint = self._bits = ""
        self._llama: Llama | None = None
        self._facts: dict[str, Any] = {}
        self._asked: tuple[Any, list[int]] | None = None

    @property
    def ranks(self) -> int:  # type: ignore[override]
        """How many processes share the model: ``PERDURE_RANKS``."""
        return self._settings().ranks

    @property
    def slots(self) -> int:  # type: ignore[override]
        """How many requests run at once: ``PERDURE_SLOTS``."""
        return self._settings().slots

    def load(self) -> None:
        """Read the model, ready the device, and prove that it computes exactly.

        Raises :class:`~perdure.protocol.errors.SettingsError`, saying what to do.
        """
        # OpenMP's threads wait for each other by spinning. Where two workers share the cores they spin in each other's
        # way: passes of seconds were seen, against a fifth of one. Read when torch is loaded, so set before it is.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")

        import torch

        from .model.device import describe_device, prepare_device
        from .model.exactness import sampler_bits
        from .model.key_memory import begin_measuring
        from .model.llama import BUCKET, Llama
        from .model.parallel import ParallelLlama, place
        from .tokenizer import Tokenizer
        from .weights.models import read

        settings = self._settings()
        device = prepare_device(place(settings, self.group) if self.group else settings)
        bundle = read(settings)
        if self.group:
            self.group.use(device)
            llama: Llama = ParallelLlama(bundle, device, settings.slots, self.group)
        else:
            llama = Llama(bundle, device, settings.slots)
        self._tokenizer = Tokenizer(bundle.vocabulary, bundle.shape.vocabulary)
        begin_measuring(device)
        self._facts = describe_device(device) | {
            "model": bundle.digest,
            "dtype": settings.dtype,
            "rows": llama.rows,
            "chunk": llama.chunk,
            "block": llama.block,
            "bucket": BUCKET,
            "operators": llama.operators.name,
            "sampler": sampler_bits(),
        }
        self._context = bundle.shape.context
        self._threads = torch.get_num_threads()
        self._llama = llama
        if self.group is None:
            self._begin()

    def meet(self) -> None:
        """Prove with the other ranks that they compute exactly, as :meth:`load` does alone."""
        self._begin()

    def _begin(self) -> None:
        """An empty engine, and the proof of what it computes with."""
        from .engine import TextEngine
        from .model.exactness import self_check
        from .model.key_memory import KeyMemory
        from .model.trace import Trace

        assert self._llama is not None
        settings = self._settings()
        self._bits = self_check(self._llama)
        facts = self._facts | {"bits": self._bits}
        self._fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        # All ranks compute the same rows: one of them says so.
        trace = Trace(settings.trace if self.group is None or self.group.rank == 0 else "")
        memory = KeyMemory.measured(
            self._llama.device, settings.kv_memory
        )  # the self-check has made the largest exact passes
        self._engine = TextEngine(self._llama, trace, self._fingerprint, settings.max_state, memory)

    def fingerprint(self) -> str:
        """SHA-256 of the weights, tokenizer, template, dtype, canonical shapes, sampler, libraries, device and bits."""
        self._loaded()
        return self._fingerprint

    def prepare(self, payload: Any) -> dict[str, Any]:
        """Check the payload and complete it; a seed is drawn and stored if it has none."""
        return complete(payload)

    def memory_needed(self, payload: Any) -> int:
        """Bytes of the keys and values of the whole request: prompt and ``max_tokens``, for each of its answers.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` as :meth:`admit` does.
        """
        engine, _ = self._loaded()
        parameters, prompt = self._read(payload, "")
        self._asked = payload, prompt
        return engine.memory_needed(len(prompt), parameters)

    def memory_free(self) -> int | None:
        """What is left of ``PERDURE_KV_MEMORY`` and of the CUDA device; ``None`` on a CPU without that setting."""
        engine, _ = self._loaded()
        return engine.memory_free()

    def admit(self, request: Request) -> None:
        """Take a request in, from its payload and from the outputs it already has.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` for what :meth:`prepare` would refuse, and for what only
        the model can tell: a prompt that does not fit, a token that it does not know.
        """
        from .generation import Generation, known_outputs
        from .transcript import Transcript

        engine, tokenizer = self._loaded()
        if request.id in engine:
            raise RuntimeError(f"request {request.id} is already admitted")
        if len(engine) >= self.slots:
            raise RuntimeError(f"no slot is free for request {request.id}: all {self.slots} are taken")
        parameters, prompt = self._read(request.payload, request.id)
        self._asked = None
        if self.group is not None:
            # Each rank has the keys of its own heads, and a request one state: that of rank 0.
            parameters = dataclasses.replace(parameters, kv=False)
        transcripts = [
            Transcript(
                tokenizer.pieces,
                tokenizer.ends,
                parameters.stop,
                parameters.max_tokens,
                prompt_tokens=len(prompt),
                min_tokens=parameters.min_tokens,
            )
            for _ in range(parameters.n)
        ]
        state = request.state if self.group is None else None
        known = known_outputs(request, len(tokenizer.pieces), parameters)
        item = Generation.of(request.id, request.execution, prompt, parameters, transcripts, known, state)
        engine.admit(item)

    def step(self) -> list[Step]:
        """One forward pass; nothing when no request is admitted."""
        engine, _ = self._loaded()
        if not engine:
            return []
        import torch

        # Whatever else ran in this process may have changed what the bits depend on.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return engine.step()

    def probe(self) -> bool | None:
        """Whether the self-check gives the bits that it gave at the load; ``None`` on ranks, which it would take
        together.
        """
        if self.group or self._llama is None:
            return None
        from .model.exactness import self_check

        return self_check(self._llama) == self._bits

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        if self._engine is not None:
            self._engine.drop(request_id)

    def _read(self, payload: Any, request_id: str) -> tuple[Parameters, list[int]]:
        """What a payload asks for, and the ids of its prompt; every limit is checked before the work that it bounds."""
        _, tokenizer = self._loaded()
        check_size(payload, self._context)
        parameters = Parameters.of(payload, request_id)
        size = len(tokenizer.pieces)
        parameters.check_vocabulary(size)
        parameters.check_result(size, self._settings().max_payload)
        if self._asked is not None and self._asked[0] is payload:
            return parameters, self._asked[1]  # tokenised when it was asked what memory it needs
        if parameters.token_ids is not None:
            prompt = list(parameters.token_ids)
        elif parameters.prompt is not None:
            prompt = tokenizer.encode(parameters.prompt, self._context)
        else:
            prompt = tokenizer.encode_chat(parameters.messages or (), self._context)
        parameters.check_prompt(prompt, size, self._context)
        return parameters, prompt

    def _settings(self) -> Settings:
        if self._given is None:
            self._given = Settings.from_environment()
        return self._given

    def _loaded(self) -> tuple[TextEngine, Tokenizer]:
        if self._engine is None or self._tokenizer is None:
            raise RuntimeError("load() comes first")
        return self._engine, self._tokenizer


generate = Generate()
