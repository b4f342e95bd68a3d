"""What the reference engine keeps of a request: the keys and values that are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...generation import Generation, Sibling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class CachedSibling(Sibling):
    """``cached`` counts the positions whose keys are computed. Below its last known token it is in replay; at it, in
    decode.
    """

    keys: Tensor | None = None
    cached: int = 0

    def put(self, token: int, scored: Any) -> dict[str, Any] | None:
        """As any other; one that has ended needs no keys."""
        # Named: a dataclass with slots is a second class, of which super() knows nothing.
        output = Sibling.put(self, token, scored)
        if self.transcript.finish_reason:
            self.keys = None
        return output


@dataclass(slots=True, eq=False)
class CachedGeneration(Generation):
    """``prefilled`` counts the positions of its prompt whose keys are computed; ``kept`` those that are in its state,
    ``None`` before there was one to write. Its siblings share the prompt's keys; each takes a copy once they are
    computed.
    """

    keys: Tensor | None = None
    prefilled: int = 0
    kept: int | None = None

    sibling_type: ClassVar[type[Sibling]] = CachedSibling

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys that it has now."""
        tensors = [self.keys, *(sibling.keys for sibling in self.siblings)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    @property
    def in_prefill(self) -> bool:
        """True as long as a part of the prompt is not computed."""
        return self.prefilled < len(self.prompt)

    @property
    def exact(self) -> bool:
        """Whether its passes have the canonical shapes."""
        return self.parameters.exact is not False

    def pending(self, sibling: CachedSibling) -> int:
        """How many known tokens of a sibling have no keys yet; at least 1 after prefill."""
        return len(self.prompt) + len(sibling.generated) - sibling.cached

    def share(self) -> None:
        """Give every sibling the keys of the prompt, which is computed."""
        keys, self.keys = self.keys, None
        assert keys is not None
        running: Sequence[CachedSibling] = self.running()
        for place, sibling in enumerate(running):
            # A copy has the same bits and the same strides.
            sibling.keys = keys.clone() if place else keys
            sibling.cached = len(self.prompt)

    def forget_keys(self) -> None:
        """Neither read the prompt's keys from the state nor write them there."""
        self.parameters = dataclasses.replace(self.parameters, kv=False)
        self.state = None

    def notes(self) -> dict[str, Any]:
        """What the result says beside its answers."""
        notes = Generation.notes(self)
        return {**notes, "kv_tokens": self.kept or 0} if self.parameters.kv else notes
