"""Text generation whose answer after a crash is, byte for byte, the answer without one.

``client.submit("perdure.workers.text.generate", {"prompt": "…", "max_tokens": 64})``. Importing this
imports neither torch nor a model: a producer that only checks its payloads stays light.
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from ...protocol.errors import InvalidRequest, SettingsError
from ...protocol.settings import Settings
from ..tasks.base import BatchTask, Request, Step
from .parameters import Parameters, check_size, complete

if TYPE_CHECKING:
    from .engines.base import TextEngine

__all__ = ["Generate", "generate"]

LOG: Final = logging.getLogger("rq.worker")

ENGINES: Final = {"builtin": "BuiltinEngine", "transformers": "TransformersEngine", "vllm": "VllmEngine"}
"""The engines that ``PERDURE_ENGINE`` may name: each is a folder of :mod:`.engines` that has this class."""


def check_engine(name: str) -> str:
    """The name of an engine. Raises :class:`~perdure.protocol.errors.SettingsError` for one that is not there."""
    if name not in ENGINES:
        raise SettingsError(f"PERDURE_ENGINE must be one of {', '.join(ENGINES)}, not {name!r}")
    if name != "builtin" and find_spec(name) is None:
        raise SettingsError(f"the engine {name} needs a package: pip install 'perdure[{name}]'")
    return name


class Generate(BatchTask):
    """Generate text with the engine that ``PERDURE_ENGINE`` names, and the model that ``PERDURE_MODEL`` does.

    The payload has a ``prompt``, or ``messages`` for the model's chat template, or ``token_ids``,
    to which nothing is added; and may have ``max_tokens`` (128), ``min_tokens`` (0), ``temperature``
    (0: greedy), ``min_p``, ``top_p``, ``top_k``, ``seed``, ``stop``, ``repetition_penalty`` (1),
    ``presence_penalty`` (0), ``frequency_penalty`` (0), ``logit_bias`` (token id to −100…100),
    ``logprobs``, ``n`` (1), ``exact`` and ``kv`` (false). Penalties and biases are functions of the tokens so
    far (formulas:
    :meth:`~perdure.workers.text.sampler.SampledRow.adjust`).

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

    Without ``exact`` the answer is the best that the engine promises: the same after a crash, byte for byte, or one
    that may go on with other tokens than it would have had. The result of the second kind has ``"exact": False``. With
    ``exact`` true a worker whose engine cannot promise it refuses the request; with false the ordinary shapes are used
    where no exact request is in the engine, which are faster. What was put out is kept in any case; a restart from zero
    that comes out differently is told to the reader as that of any other task.

    With ``kv`` (the built-in engine's) the keys and values of the prompt are the request's state once they are
    computed, as many of them as ``PERDURE_MAX_STATE`` has room for, and a resume reads them instead of computing them.
    The answer is the same to the last bit. The result has ``"kv_tokens"``, for how many tokens of the prompt. Where the
    model is on several ranks, ``kv`` is ignored.

    A step that put a prompt or known tokens into the cache has neither output nor result.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """``settings``: those of the environment, read when first needed, unless given."""
        self._given = settings
        self._engine: TextEngine | None = None
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
        """Read the model, ready the device, and measure what the engine can promise.

        Raises :class:`~perdure.protocol.errors.SettingsError`, saying what to do.
        """
        engine = self._make_engine(self._settings())
        engine.load(self.group)
        LOG.info("text generation with the engine %s: answers are %s", engine.name, engine.promise)
        self._engine = engine

    def meet(self) -> None:
        """Measure with the other ranks, as :meth:`load` does alone."""
        self._loaded().meet()

    def fingerprint(self) -> str:
        """The engine's: what must be equal for another worker to continue a request."""
        return self._loaded().fingerprint()

    def prepare(self, payload: Any) -> dict[str, Any]:
        """Check the payload and complete it; a seed is drawn and stored if it has none."""
        return complete(payload)

    def memory_needed(self, payload: Any) -> int | None:
        """Bytes that the engine needs for the request.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` as :meth:`admit` does.
        """
        parameters, prompt = self._read(Request(id="", payload=payload))
        self._asked = payload, prompt
        return self._loaded().memory_needed(len(prompt), parameters)

    def memory_free(self) -> int | None:
        """Bytes that the engine has for further requests; ``None`` if there is no limit."""
        return self._loaded().memory_free()

    def admit(self, request: Request) -> None:
        """Take a request in, from its payload and from the outputs it already has.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` for what :meth:`prepare` would refuse, and for what only
        the engine can tell: a prompt that does not fit, a token that it does not know, a field that it cannot do.
        """
        engine = self._loaded()
        if request.id in engine:
            raise RuntimeError(f"request {request.id} is already admitted")
        if len(engine) >= self.slots:
            raise RuntimeError(f"no slot is free for request {request.id}: all {self.slots} are taken")
        parameters, prompt = self._read(request)
        self._asked = None
        if not engine.promise.exact:
            parameters = dataclasses.replace(parameters, exact=False)
        grammars = engine.grammars if parameters.structured_outputs else None
        engine.admit(engine.generation.of(request, prompt, parameters, engine.tokenizer, grammars))

    def step(self) -> list[Step]:
        """One step of the engine; nothing when no request is admitted."""
        engine = self._loaded()
        return engine.step() if engine else []

    def probe(self) -> bool | None:
        """Whether the engine still computes."""
        return None if self._engine is None else self._engine.probe()

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        if self._engine is not None:
            self._engine.drop(request_id)

    def _read(self, request: Request) -> tuple[Parameters, list[int]]:
        """What a payload asks for, and the ids of its prompt; every limit is checked before the work that it bounds."""
        engine, payload = self._loaded(), request.payload
        tokenizer, size, context = engine.tokenizer, engine.size, engine.context
        check_size(payload, context)
        parameters = Parameters.of(payload, request.id)
        for name, why in engine.refused.items():
            if parameters.asks(name):
                raise InvalidRequest(f"the engine {engine.name} has no {name}: {why}", name)
        if parameters.exact and not engine.promise.exact:
            raise InvalidRequest(
                f"exact is asked for, and the engine {engine.name} cannot promise it here ({engine.promise}); "
                "leave it out, or run an engine that can",
                "exact",
            )
        parameters.check_vocabulary(size)
        parameters.check_result(size, self._settings().max_payload)
        dated = parameters.messages is not None and tokenizer.dated
        if self._asked is not None and self._asked[0] is payload and not dated:
            return parameters, self._asked[1]  # tokenised when it was asked what memory it needs
        if parameters.token_ids is not None:
            prompt = list(parameters.token_ids)
        elif parameters.prompt is not None:
            prompt = tokenizer.encode(parameters.prompt, context)
        else:
            # A template may write the date: that of the submit, which a resume on another day has as well.
            now = datetime.fromtimestamp(request.submitted, UTC) if request.submitted else None
            prompt = tokenizer.encode_chat(parameters.messages or (), context, now=now, **parameters.template)
        parameters.check_prompt(prompt, size, context)
        return parameters, prompt

    def _make_engine(self, settings: Settings) -> TextEngine:
        name = check_engine(settings.engine)
        made: TextEngine = getattr(import_module(f"{__name__}.engines.{name}"), ENGINES[name])(settings)
        return made

    def _settings(self) -> Settings:
        if self._given is None:
            self._given = Settings.from_environment()
        return self._given

    def _loaded(self) -> TextEngine:
        if self._engine is None:
            raise RuntimeError("load() comes first")
        return self._engine


generate = Generate()
