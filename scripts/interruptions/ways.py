"""The ways in which answers are asked for."""

from __future__ import annotations

from typing import Any, Final

SCHEMA: Final = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob"]},
        "old": {"type": "boolean"},
        "ages": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "old", "ages"],
    "additionalProperties": False,
}

WAYS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.001},
    "json": {"temperature": 0.8, "structured_outputs": {"json": SCHEMA}, "max_tokens": 200},
    "penalties": {
        "temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.2,
        "min_tokens": 20,
    },
    "three": {"n": 3, "temperature": 1.0},
    "stop": {"temperature": 1.0, "stop": ["ab", "é", "\x01\x02"]},
    "logprobs": {"temperature": 1.0, "logprobs": 3},
}  # fmt: skip
"""Fields of the payload, by name; the rest is :func:`payload`'s."""


def payload(way: str, number: int) -> dict[str, Any]:
    """One of many payloads of a way: prompts of many lengths, seeds of their own."""
    prompt = f"Request {number}: " + "what outlives its process? " * (number % 7)
    return {"prompt": prompt, "max_tokens": 40, "seed": number, **WAYS[way]}
