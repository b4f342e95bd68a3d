"""Causal language models of the ``transformers`` package.

For models that the built-in engine does not know. Each request has a cache of its own and a forward
pass of its own for every token: there is no batching, so eight requests take eight passes. Requests
join and leave between two tokens all the same, and share the weights.

A resume puts the prompt and the known tokens through the model in one pass. That pass has other
shapes than the ones before the crash, so its last bits may differ, and with them, now and then, a
token. What was put out stays as it is; nothing else is promised.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .....protocol.errors import SettingsError
from .....protocol.settings import Settings
from ....tasks.base import RAISED, Raised, Step
from ....tasks.collectives import Collectives
from ..base import Promise, TextEngine, steps_of

if TYPE_CHECKING:
    from ...generation import Generation
    from ...hub import HubTokenizer

LOG: Final = logging.getLogger("rq.worker")

Factory = Callable[[], tuple[Any, Any]]

_MISSING: Final = "the package transformers is needed for this engine: pip install 'perdure[transformers]'"

_SHARED: Final = (
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
    "cache_dir",
    "local_files_only",
    "force_download",
)
"""Options that say which files are meant: tokenizer and model are read with the same ones."""


@dataclass(slots=True)
class _Running:
    """One request: its generation, and the cache that its model has filled so far."""

    generation: Generation
    cache: Any = None
    pending: list[int] = field(default_factory=list)
    """Tokens that the model has not seen: at first the prompt and all that is known, then one; all, without a cache."""


class TransformersEngine(TextEngine):
    """``source``: a folder or a name that ``from_pretrained`` takes, or a callable without arguments that returns
    ``(model, tokenizer)``; ``PERDURE_MODEL`` unless given. ``options`` go to ``from_pretrained``.
    """

    name = "transformers"
    refused: ClassVar[Mapping[str, str]] = {
        "n": "it makes one answer a request",
        "kv": "it keeps no keys",
    }

    tokenizer: HubTokenizer

    def __init__(
        self, settings: Settings, source: str | Factory | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings)
        self.promise = Promise(exact=False)
        self._source = settings.model if source is None else source
        self._options = dict(options or {})
        self._model: Any = None
        self._caches = True
        self._fingerprint = ""
        self._requests: dict[str, _Running] = {}

    def load(self, group: Collectives | None = None) -> None:
        """Read the model."""
        if group is not None:
            raise SettingsError("PERDURE_RANKS is for the built-in engine; this one runs in one process")
        try:
            import transformers
        except ImportError as error:
            raise SettingsError(f"{_MISSING} ({error})") from error
        import torch

        from ...hub import HubTokenizer, end_tokens
        from ...model.device import prepare_device

        device = prepare_device(self.settings)
        # Models may use operators that have no deterministic form; to refuse them would promise what is not kept.
        torch.use_deterministic_algorithms(False)
        if callable(self._source):
            model, encoder = self._source()
        else:
            shared = {name: value for name, value in self._options.items() if name in _SHARED}
            model = transformers.AutoModelForCausalLM.from_pretrained(self._source, **self._options)
            encoder = transformers.AutoTokenizer.from_pretrained(self._source, **shared)
        self._caches = _has_cache(model)
        if not self._caches:
            LOG.warning(
                "%s takes no past_key_values: each token is computed with all of those before it", type(model).__name__
            )
        self._model = model.to(device).eval()
        # What it can read: it may be able to write more, or fewer.
        self.size = min(
            int(layer().weight.shape[0]) for layer in (model.get_input_embeddings, model.get_output_embeddings)
        )
        config = model.config.get_text_config(decoder=True)
        self.tokenizer = HubTokenizer(
            encoder, end_tokens(encoder, getattr(model, "generation_config", None), model.config, config), self.size
        )
        self.context = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        self._fingerprint = _digest(model, self.tokenizer.definition)

    def fingerprint(self) -> str:
        """SHA-256 over weights, configuration, tokenizer and sampler: another release or device may go on."""
        return self._fingerprint

    def admit(self, item: Generation) -> None:
        """Take a request in."""
        self._requests[item.id] = _Running(item, pending=[*item.prompt, *item.siblings[0].generated])

    def step(self) -> list[Step]:
        """One token for each request, one request after the other; what one of them raises is that one's alone."""
        steps: list[Step] = []
        for name, item in list(self._requests.items()):
            try:
                steps += self._advance(item)
            except ArithmeticError as error:
                steps.append(Step(request_id=name, error=error))
            except RAISED as error:
                steps.append(Raised(request_id=name, error=error))
            if steps[-1].ends:
                self.drop(name)
        return steps

    def drop(self, request_id: str) -> None:
        """Forget a request and its cache; unknown ids are ignored."""
        self._requests.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def _advance(self, item: _Running) -> list[Step]:
        import torch

        from ...sampler import choose, score

        generation = item.generation
        if generation.ended:
            return steps_of(generation, [])
        sibling = generation.siblings[0]
        with torch.inference_mode():
            ids = torch.tensor([item.pending], device=self._model.device)
            cache = {"past_key_values": item.cache, "use_cache": True} if self._caches else {"use_cache": False}
            found = self._model(input_ids=ids, **cache)
            logits = found.logits[0, -1:, : self.size].float().cpu()
        item.cache = found.past_key_values if self._caches else None
        token = choose(logits, [sibling.row])[0]
        if token < 0:
            raise ArithmeticError(f"the model's logits for output {len(sibling.generated)} are not finite")
        asked = generation.parameters.logprobs
        scored = {} if asked is None else score(logits[0].numpy(), token, asked)
        output = generation.put(sibling, token, scored)
        item.pending = sibling.generated[-1:] if self._caches else [*generation.prompt, *sibling.generated]
        return steps_of(generation, [output])


def _has_cache(model: Any) -> bool:
    """Whether a model's forward pass takes the keys of the one before (state-space models call theirs otherwise)."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def _digest(model: Any, definition: str) -> str:
    import torch

    from ...sampler import VERSION

    digest = hashlib.sha256(f"{VERSION} {definition}".encode())
    # Where the files lie is no part of the model, nor which release has read them.
    beside = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in beside}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
