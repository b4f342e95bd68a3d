"""A causal language model of the ``transformers`` package as a task of its own.

For one model of several in a pool, or one that a factory makes; where all requests of ``perdure.workers.text.generate``
are for one model, ``PERDURE_ENGINE=transformers`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...protocol.errors import InvalidRequest
from ...protocol.settings import Settings
from . import Generate
from .engines.base import TextEngine
from .engines.transformers import Factory, TransformersEngine

__all__ = ["CausalLM"]


class CausalLM(Generate):
    """Generate text with a causal language model of ``transformers``.

    Make an instance at the top level of a module, and submit it or its dotted path::

        chat = CausalLM("/models/some-model")

    ``model``: a folder or a name that ``from_pretrained`` takes, or a callable without arguments that
    returns ``(model, tokenizer)``. The tokenizer must be a fast one. ``options`` go to the model's
    ``from_pretrained``, and those that say which files are meant to the tokenizer's, too. Device, slots and threads are
    those of ``PERDURE_*``.

    Payload, outputs and result are those of :class:`~perdure.workers.text.Generate`, without ``n`` and ``kv``, and
    ``exact`` cannot be demanded; sampling is the same code, with the same noise for a seed, and no settings of
    the model's own generation config but its end tokens. The result has ``"exact": False``.
    """

    reproducible = False

    def __init__(
        self, model: str | Factory, options: Mapping[str, Any] | None = None, settings: Settings | None = None
    ) -> None:
        super().__init__(settings)
        self._model = model
        self._options = options

    @property
    def ranks(self) -> int:  # type: ignore[override]
        """One: it runs in one process."""
        return 1

    def prepare(self, payload: Any) -> dict[str, Any]:
        """Check the payload and complete it; a seed is drawn and stored if it has none."""
        result = super().prepare(payload)
        for name, why in TransformersEngine.refused.items():
            if result.get(name):
                raise InvalidRequest(f"the engine transformers has no {name}: {why}", name)
        return result

    def _make_engine(self, settings: Settings) -> TextEngine:
        return TransformersEngine(settings, self._model, self._options)
