"""Text generation that raises for some of its requests, as an operator does that fails for one shape."""

from __future__ import annotations

from perdure.workers import Request, Step
from perdure.workers.text import Generate


class Fragile(Generate):
    """The step of whoever is among those whose prompt says so raises."""

    _poisons: frozenset[str] = frozenset()

    def admit(self, request: Request) -> None:
        super().admit(request)
        if "poison" in request.payload["prompt"]:
            self._poisons |= {request.id}

    def drop(self, request_id: str) -> None:
        super().drop(request_id)
        self._poisons -= {request_id}

    def step(self) -> list[Step]:
        if self._poisons:
            raise RuntimeError(f"no kernel for {len(self._poisons)}")
        return super().step()
