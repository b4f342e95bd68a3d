"""Causal language models of the ``transformers`` package as a task.

For models that the built-in engine does not know. Each request has a cache of its own and a forward
pass of its own for every token: there is no batching, so eight requests take eight passes. Requests
join and leave between two tokens all the same, and share the weights.

A resume puts the prompt and the known tokens through the model in one pass. That pass has other
shapes than the ones before the crash, so its last bits may differ, and with them, now and then, a
token. What was put out stays as it is; nothing else is promised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ...protocol.errors import InvalidRequest, SettingsError
from ...protocol.settings import Settings
from ..tasks.base import RAISED, BatchTask, Raised, Request, Step
from .parameters import Parameters, check_size, complete

if TYPE_CHECKING:
    from .generation import Generation
    from .tokenizer import Tokenizer

__all__ = ["CausalLM"]

Factory = Callable[[], tuple[Any, Any]]

REFUSED: Final = ("n", "exact", "kv")
"""Fields of the built-in engine that have no meaning here."""

_MISSING = "the package transformers is needed for this task: pip install 'perdure[transformers]'"


@dataclass(slots=True)
class _Running:
    """One request: its generation, and the cache that its model has filled so far."""

    generation: Generation
    cache: Any = None
    pending: list[int] = field(default_factory=list)
    """Tokens that the model has not seen: at first the prompt and all that is known, later one."""


class CausalLM(BatchTask):
    """Generate text with a causal language model of ``transformers``.

    Make an instance at the top level of a module, and submit it or its dotted path::

        chat = CausalLM("/models/some-model")

    ``model``: a folder or a name that ``from_pretrained`` takes, or a callable without arguments that
    returns ``(model, tokenizer)``. The tokenizer must be a fast one. ``options`` go to the model's
    ``from_pretrained``. Device, slots and threads are those of ``PERDURE_*``.

    Payload, outputs and result are those of :class:`~perdure.workers.text.Generate`, without ``n``,
    ``exact`` and ``kv``; sampling is the same code, with the same noise for a seed, and no settings of
    the model's own generation config but its end tokens. The result has ``"exact": False``.
    """

    reproducible = False

    def __init__(
        self, model: str | Factory, options: Mapping[str, Any] | None = None, settings: Settings | None = None
    ) -> None:
        self._source = model
        self._options = dict(options or {})
        self._given = settings
        self._model: Any = None
        self._encoder: Any = None
        self._tokenizer: Tokenizer | None = None
        self._fingerprint = ""
        self._context = 0
        self._size = 0
        self._requests: dict[str, _Running] = {}

    @property
    def slots(self) -> int:  # type: ignore[override]
        """How many requests are in flight at once: ``PERDURE_SLOTS``."""
        return self._settings().slots

    def load(self) -> None:
        """Read the model. Raises :class:`~perdure.protocol.errors.SettingsError`, saying what to do."""
        try:
            import transformers
        except ImportError as error:
            raise SettingsError(f"{_MISSING} ({error})") from error
        import torch

        from .model.device import describe_device, prepare_device
        from .tokenizer import Tokenizer, Vocabulary

        device = prepare_device(self._settings())
        # Models may use operators that have no deterministic form; to refuse them would promise what is not kept.
        torch.use_deterministic_algorithms(False)
        if callable(self._source):
            model, encoder = self._source()
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(self._source, **self._options)
            encoder = transformers.AutoTokenizer.from_pretrained(self._source)
        if not getattr(encoder, "is_fast", False):
            raise SettingsError(
                f"{type(encoder).__name__} is not a fast tokenizer: the bytes of its tokens cannot be told; "
                "convert it, or give a factory that returns a PreTrainedTokenizerFast"
            )
        self._model = model.to(device).eval()
        self._encoder = encoder
        definition = encoder.backend_tokenizer.to_str()
        # What it can read: it may be able to write more, or fewer.
        self._size = size = min(
            int(layer().weight.shape[0]) for layer in (model.get_input_embeddings, model.get_output_embeddings)
        )
        self._tokenizer = Tokenizer(Vocabulary(definition=definition, ends=_ends(model, encoder)), size)
        self._context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
        self._fingerprint = _digest(model, definition, describe_device(device), transformers.__version__)

    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokenizer, libraries and device."""
        return self._fingerprint

    def prepare(self, payload: Any) -> dict[str, Any]:
        """Check the payload and complete it; a seed is drawn and stored if it has none."""
        result = complete(payload)
        for name in REFUSED:
            if name in result:
                raise InvalidRequest(f"{name} is a field of the built-in engine; this task does not have it", name)
        return result

    def admit(self, request: Request) -> None:
        """Take a request in, from its payload and from the outputs it already has. Raises :class:`InvalidRequest`."""
        from .generation import Generation, known_outputs
        from .transcript import Transcript

        if self._tokenizer is None:
            raise RuntimeError("load() comes first")
        if request.id in self._requests:
            raise RuntimeError(f"request {request.id} is already admitted")
        if len(self._requests) >= self.slots:
            raise RuntimeError(f"no slot is free for request {request.id}: all {self.slots} are taken")
        check_size(request.payload, self._context)
        parameters = Parameters.of(request.payload, request.id)
        if parameters.n > 1 or parameters.kv or not parameters.exact:
            self.prepare(request.payload)  # raises
        size = self._size
        parameters.check_vocabulary(size)
        parameters.check_result(size, self._settings().max_payload)
        prompt = self._encoded(parameters, self._tokenizer)
        parameters.check_prompt(prompt, size, self._context)
        transcript = Transcript(
            self._tokenizer.pieces,
            self._tokenizer.ends,
            parameters.stop,
            parameters.max_tokens,
            prompt_tokens=len(prompt),
            min_tokens=parameters.min_tokens,
        )
        known = known_outputs(request, size, parameters)
        item = Generation.of(request.id, request.execution, prompt, parameters, [transcript], known)
        self._requests[request.id] = _Running(item, pending=[*prompt, *item.siblings[0].generated])

    def step(self) -> list[Step]:
        """One token for each request, one request after the other; what one of them raises is that one's alone."""
        steps: list[Step] = []
        for name, item in list(self._requests.items()):
            try:
                steps.append(self._advance(item))
            except ArithmeticError as error:
                steps.append(Step(request_id=name, error=error))
            except RAISED as error:
                steps.append(Raised(request_id=name, error=error))
            if steps[-1].error is not None:
                self.drop(name)
        return steps

    def drop(self, request_id: str) -> None:
        """Forget a request and its cache; unknown ids are ignored."""
        self._requests.pop(request_id, None)

    def _advance(self, item: _Running) -> Step:
        import torch

        generation = item.generation
        output = None
        if not generation.ended:
            sibling = generation.siblings[0]
            with torch.inference_mode():
                ids = torch.tensor([item.pending], device=self._model.device)
                found = self._model(input_ids=ids, past_key_values=item.cache, use_cache=True)
                logits = found.logits[0, -1, : self._size].float().cpu().numpy()
            item.cache = found.past_key_values
            output = generation.advance(sibling, logits)
            item.pending = sibling.generated[-1:]
        if not generation.ended:
            return Step(request_id=generation.id, output=output)
        self.drop(generation.id)
        result = generation.result() | {"exact": False}
        if output is None:
            return Step(request_id=generation.id, result=result)
        return Step(request_id=generation.id, output=output, result=result)

    def _encoded(self, parameters: Parameters, tokenizer: Tokenizer) -> list[int]:
        if parameters.token_ids is not None:
            return list(parameters.token_ids)
        if parameters.prompt is not None:
            tokenizer.check_length(parameters.prompt, self._context, "prompt")
            return [int(token) for token in self._encoder(parameters.prompt)["input_ids"]]
        if not self._encoder.chat_template:
            raise InvalidRequest("this model has no chat template; use prompt instead of messages", field="messages")
        from jinja2.exceptions import TemplateError

        messages = [dict(message) for message in parameters.messages or ()]
        try:
            text = self._encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error
        tokenizer.check_length(text, self._context, "messages")
        return [int(token) for token in self._encoder(text, add_special_tokens=False)["input_ids"]]

    def _settings(self) -> Settings:
        if self._given is None:
            self._given = Settings.from_environment()
        return self._given


def _ends(model: Any, encoder: Any) -> tuple[int, ...]:
    """The tokens that end a text, as the model's generation config, its config and its tokenizer name them."""
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, encoder):
        value = getattr(owner, "eos_token_id", None)
        ends.update([value] if isinstance(value, int) else value or ())
    return tuple(sorted(ends))


def _digest(model: Any, definition: str, device: Mapping[str, str], version: str) -> str:
    import torch

    digest = hashlib.sha256(json.dumps({**device, "transformers": version}, sort_keys=True).encode())
    digest.update(definition.encode())
    # Where the files lie is no part of the model.
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
