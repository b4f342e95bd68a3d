"""The transitions of guardians: signs of life."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..keys import SCHEMA, listed
from ..settings import Settings
from .rows import in_ms
from .sweeps import Sweeps

if TYPE_CHECKING:
    from .calls import Pulse

MAX_UNFIT: Final = 500
"""Characters of the reason for which a device is not used."""


def refreshed(settings: Settings) -> float:
    """Seconds after which a worker says all of itself again, though nothing has changed; :meth:`Heartbeats.beat` does
    in between. RQ's record of it lives 60 s.
    """
    return 10 * min(settings.heartbeat, 1.0)


class Heartbeats(Sweeps):
    """What a guardian says, and what a sweep does."""

    def heartbeat(
        self,
        *,
        incarnation: str,
        worker: str,
        queues: Sequence[str],
        pid: int,
        host: str,
        device: str = "",
        ready: bool | str = True,
        fingerprints: Iterable[str] = (),
        unfit: str = "",
        health: str = "",
        model: str = "",
        stale: str = "",
        unable: Sequence[Mapping[str, Any]] = (),
    ) -> Pulse:
        """Say that a worker process lives; ``ready`` once it claims, or ``"spare"`` once it only waits
        to be told, or ``"leaving"`` from when it was told to stop, ``unfit`` if its device is not to be used.

        ``health`` is the URL of its health pages, ``model`` the setting of that name, ``stale`` a file that was edited
        after it had been loaded. ``unable``: ``task``, ``kind``, ``reason`` and ``age`` (seconds) of each task that it
        could not load.
        """
        from .calls import Pulse

        values = {
            "schema": SCHEMA, "incarnation": incarnation, "worker": worker, "queues_text": listed(queues),
            "pid": pid, "host": host, "device": device, "ready": ready if isinstance(ready, str) else int(ready),
            **self._times(),
            "unfit": unfit[:MAX_UNFIT], "health": health, "model": model, "stale": stale[:MAX_UNFIT],
        }  # fmt: skip
        groups = {
            "queue": [{"queue": queue} for queue in queues],
            "model": [{"fingerprint": fingerprint} for fingerprint in fingerprints],
            "inability": [
                {
                    "task": row["task"],
                    "kind": row["kind"],
                    "age_ms": max(0, round(row["age"] * 1000)),
                    "reason": " ".join(row["reason"].split())[:MAX_UNFIT],
                }
                for row in unable
            ],
        }
        status, due = self._call("heartbeat", values, groups)
        return Pulse(status, due == "1")

    def beat(self, incarnation: str) -> bool:
        """Say that a worker process lives of which nothing has changed; False if the whole heartbeat is to follow."""
        return bool(self._call("beat", {"incarnation": incarnation, **self._times()}, {}) == "ok")

    def _times(self) -> dict[str, int]:
        return {
            "timeout_ms": in_ms(self.settings.heartbeat_timeout),
            # Less than a heartbeat: a guardian that sweeps alone does so at each.
            "due_ms": in_ms(max(1.5 * self.settings.reap_interval, 0.75 * self.settings.heartbeat)),
        }
