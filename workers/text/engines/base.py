"""What an engine of text generation must do.

Payloads, prompts, templates, stop texts, the text of a stream, answers side by side and results are the same for all
engines and none of their business. An engine is given prompts and tokens so far, as ids, and brings one token after the
other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ....protocol.errors import SettingsError
from ....protocol.settings import Settings
from ...tasks.base import Step
from ...tasks.collectives import Collectives
from ..parameters import Parameters

if TYPE_CHECKING:  # producers check payloads, and have no torch
    from ..generation import Generation
    from ..grammar import Grammars
    from ..tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What an answer is after a crash, as it was measured at load.

    ``exact``: the bytes of the undisturbed run. Else *continued*: what was put out never changes, and the rest is what
    the same engine says after it. ``compared`` tokens were computed again, cut and uncut, alone and in company; the
    logits of ``different`` of them were not the same to the last bit.
    """

    exact: bool
    compared: int = 0
    different: int = 0
    tokens: int = 0
    """Of those that differed, how many were other tokens."""

    def __str__(self) -> str:
        if not self.compared:
            return f"{'exact' if self.exact else 'continued'} after a crash"
        what = "exact" if self.exact else "continued"
        return (
            f"{what} after a crash: of {self.compared} tokens that were computed again, {self.different} had logits "
            f"with other last bits, and {self.tokens} came out differently"
        )


class TextEngine(ABC):
    """One model, loaded.

    The worker calls, from one thread: :meth:`load` once; :meth:`admit` when a request joins; :meth:`step` as long as
    any is admitted; :meth:`drop` when one leaves that has not ended; :meth:`close` when the process leaves in peace.
    """

    name: ClassVar[str]
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of a payload that this engine cannot do, and why: a request that asks for one is refused."""
    tokenizer: Tokenizer
    size: int
    """How many tokens the model knows; set by :meth:`load`, as is what follows."""
    context: int
    """How many tokens a prompt and its answer may have together."""
    promise: Promise

    takes_arguments: ClassVar[bool] = False
    """Whether ``PERDURE_ENGINE_ARGS`` says something to it."""

    def __init__(self, settings: Settings) -> None:
        if settings.engine_args and not self.takes_arguments:
            raise SettingsError(
                f"PERDURE_ENGINE_ARGS has {settings.engine_args[0]!r}, but the engine {self.name} takes no arguments"
            )
        self.settings = settings

    @abstractmethod
    def load(self, group: Collectives | None = None) -> None:
        """Read the model and ready the device.

        Raises :class:`~perdure.protocol.errors.SettingsError`, saying what to do.
        ``group``: this process' place among several that share the model, which cannot be reached yet.
        """

    def meet(self) -> None:  # noqa: B027  # most engines know no group
        """Begin anew with the other processes of the group, none of which has a request; or alone, after :meth:`load`.

        What is measured of the engine is measured here.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """What must be equal for another worker to continue a request of this one.

        Where answers are exact that is all that decides about a bit; else the model, its tokenizer and the sampler, so
        that another release or device continues what this one began.
        """

    @property
    def generation(self) -> type[Generation]:
        """What it keeps of a request."""
        from ..generation import Generation

        return Generation

    @cached_property
    def grammars(self) -> Grammars:
        """The forms that answers may have. Raises :class:`~perdure.protocol.errors.InvalidRequest` if none can."""
        from ..grammar import Grammars

        return Grammars(self.tokenizer, self.size)

    def memory_needed(self, prompt: int, parameters: Parameters) -> int | None:
        """Bytes that a request with a prompt of so many tokens takes; ``None`` if nobody can tell."""
        return None

    def memory_free(self) -> int | None:
        """Bytes free for further requests; ``None`` if nobody can tell, or there is no limit."""
        return None

    @abstractmethod
    def admit(self, item: Generation) -> None:
        """Take a request in, whose prompt and known tokens fit into the context.

        Raises :class:`~perdure.protocol.errors.InvalidRequest` for what only this engine can tell.
        """

    @abstractmethod
    def step(self) -> list[Step]:
        """One pass, or as much as the engine does at once. A request leaves with the step that ends it."""

    @abstractmethod
    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""

    def probe(self) -> bool | None:
        """Whether it still computes; ``None`` if nobody can tell. Called with no request admitted."""
        return None

    def close(self) -> None:  # noqa: B027  # most have nothing that outlives them
        """Let go of the device and of every process of its own."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, request_id: str) -> bool: ...


def steps_of(item: Generation, outputs: Iterable[dict[str, Any] | None]) -> list[Step]:
    """A step for each output, the last one with the result if the request has ended; at least one if it has.

    ``outputs``: as :meth:`~..generation.Generation.arrive` gives them.
    """
    steps = [
        Step(request_id=item.id) if output is None else Step(request_id=item.id, output=output) for output in outputs
    ]
    if item.ended:
        last = steps.pop() if steps else Step(request_id=item.id)
        steps.append(Step(request_id=item.id, output=last.output, result=item.result()))
    return steps
