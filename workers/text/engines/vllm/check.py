"""What vLLM can promise here, measured at load: whether logits are the same to the last bit between cut and uncut,
alone and in company, at the engine's own shapes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from ....tasks.base import Request
from ...parameters import Parameters
from ..base import Promise
from .processor import DurableSampler

if TYPE_CHECKING:
    from . import VllmEngine

PROMPTS: Final = (3, 17, 40, 64, 90, 129, 160, 200)
"""Tokens of the prompts, as far as the context has room."""

TOKENS: Final = 16
ALONE: Final = 2
CUTS: Final = 4
AFTER: Final = 2
"""So many tokens are generated of each prompt in company; so many prompts alone, too; each is cut at so many places,
and so many tokens are compared behind each.
"""

Seen = dict[int, tuple[int, int]]
"""Index of an output -> checksum of its logits, and its token."""


def measure(engine: VllmEngine) -> tuple[Promise, list[int]]:
    """What holds, and the tokens of :func:`reference`."""
    prompts = list(_prompts(engine))
    whole = _run(engine, [(prompt, []) for prompt in prompts], TOKENS)
    found = [
        (other, whole[place])
        for place, prompt in enumerate(prompts[:ALONE])
        for other in _run(engine, [(prompt, [])], TOKENS)
    ]
    cut = [
        (place, 1 + (5 * place + 7 * number) % (TOKENS - AFTER))
        for number in range(CUTS)
        for place in range(len(prompts))
    ]
    begun = [(prompts[place], [whole[place][index][1] for index in range(at)]) for place, at in cut]
    found += [(other, whole[place]) for (place, _), other in zip(cut, _run(engine, begun, AFTER), strict=True)]
    pairs = [(one[index], uncut[index]) for one, uncut in found for index in one if index in uncut]
    different = sum(one[0] != other[0] for one, other in pairs)
    tokens = sum(one[1] != other[1] for one, other in pairs)
    return Promise(exact=not different, compared=len(pairs), different=different, tokens=tokens), reference(engine)


def reference(engine: VllmEngine) -> list[int]:
    """A few tokens that the engine always says, alone."""
    seen = _run(engine, [(next(_prompts(engine)), [])], 4)[0]
    return [token for _, token in seen.values()]


def _prompts(engine: VllmEngine) -> Iterator[list[int]]:
    for number, length in enumerate(PROMPTS):
        stream = hashlib.shake_256(f"prompt {number}".encode()).digest(4 * length)
        words = [int.from_bytes(stream[place : place + 4], "big") for place in range(0, len(stream), 4)]
        yield [word % engine.size for word in words[: max(1, engine.context - TOKENS - 1)]]


def _run(engine: VllmEngine, begun: Sequence[tuple[list[int], list[int]]], count: int) -> list[Seen]:
    """So many tokens of each prompt behind those that it has, all at once as far as there are slots. Half of them are
    drawn, half are greedy.
    """
    seen: list[Seen] = [{} for _ in begun]
    names = [f"check-{place}" for place in range(len(begun))]
    for place, (prompt, known) in enumerate(begun):
        payload = {
            "token_ids": prompt, "max_tokens": len(known) + count, "min_tokens": len(known) + count, "seed": 1,
            "temperature": len(prompt) % 2,
        }  # fmt: skip
        outputs: list[Any] = [{"token": token, "text": ""} for token in known]
        request = Request(id=names[place], payload=payload, outputs=outputs)
        item = engine.generation.of(request, prompt, Parameters.of(payload, names[place]), engine.tokenizer)

        def watch(index: int, values: Tensor, own: Seen = seen[place]) -> None:
            own[index] = zlib.crc32(values.contiguous().cpu().numpy().tobytes()), -1

        DurableSampler.watched[f"{names[place]}:0"] = watch
        engine.admit(item)
    try:
        while engine:
            for step in engine.step():
                if step.error is not None:
                    raise step.error
                if isinstance(step.output, dict):
                    own = seen[int(step.request_id.rpartition("-")[2])]
                    index = next(place for place in sorted(own) if own[place][1] < 0)
                    own[index] = own[index][0], step.output["token"]
    finally:
        for name in names:
            engine.drop(name)
            DurableSampler.watched.pop(f"{name}:0", None)
    return seen
