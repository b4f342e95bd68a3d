"""Exit statuses of a worker process that is not fit to go on. Who starts workers reads them, and starts another."""

from __future__ import annotations

from typing import Final

UNFIT_DEVICE: Final = 70
"""After a device error every further call of the process fails."""
OUT_OF_MEMORY: Final = 71
"""One request alone ran out of device memory again and again."""
UNFIT: Final = 72
"""Unfit for another reason, which the log says: a group whose ranks are lost again and again."""
HUNG: Final = 73
"""A step, or the courier, stood still for longer than its timeout."""
