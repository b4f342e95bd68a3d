"""By which names a line may ask for the model that a pool has."""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from ...protocol.keys import all_served
from ...protocol.store import Store

KNOWN: Final = {"smollm2": ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Names of models that settings have short ones for."""


def names(model: str) -> frozenset[str]:
    """The names of a ``PERDURE_MODEL``: as it stands, its file or folder without the ending, its published name."""
    place = PurePath(model)
    stem = place.stem if place.suffix == ".gguf" else place.name
    return frozenset({model, place.name, stem, *KNOWN.get(model, ())})


def served_models(store: Store, queue: str) -> frozenset[str] | None:
    """The names for what the living workers of a queue have; ``None`` if nobody can tell.

    That is when none lives, or one is of a release that does not say.
    """
    workers = [worker for worker in store.workers() if queue in all_served(worker["queues"])]
    if not workers or not all(worker["model"] for worker in workers):
        return None
    return frozenset().union(*(names(worker["model"]) for worker in workers))
