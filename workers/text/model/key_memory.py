"""How much room there is for the keys of further requests.

A request takes its keys when it is admitted, and with several answers more of them later: so all that it will
ever take counts from its admission on.
"""

from __future__ import annotations

from typing import Final

import torch

HEADROOM: Final = 2
"""Times the most that a pass of the self-check took beside weights and keys: passes that are not exact may be larger.
"""


def begin_measuring(device: torch.device) -> None:
    """What was needed before, to load weights or for another task, does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class KeyMemory:
    """The bytes that keys may take on one device: a fixed number, what CUDA has free, or both."""

    def __init__(self, device: torch.device, limit: int = 0, workspace: int = 0) -> None:
        """``limit``: bytes for all keys together, 0 for none; ``workspace``: bytes that a pass takes beside them."""
        self._device = device
        self._limit = limit
        self._workspace = workspace

    @classmethod
    def measured(cls, device: torch.device, limit: int) -> KeyMemory:
        """With the workspace that passes have needed since :func:`begin_measuring`."""
        if device.type != "cuda":
            return cls(device, limit)
        most = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return cls(device, limit, HEADROOM * int(most))

    def free(self, promised: int, taken: int) -> int | None:
        """Bytes free for further requests; ``None`` if there is no limit to tell.

        ``promised``: bytes that the admitted ones take at most; ``taken``: those of them that they have by now.
        """
        found = []
        if self._limit:
            found.append(self._limit - promised)
        if self._device.type == "cuda":
            kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            available = torch.cuda.mem_get_info(self._device)[0] + kept - self._workspace
            found.append(int(available) - (promised - taken))
        return max(0, min(found)) if found else None
