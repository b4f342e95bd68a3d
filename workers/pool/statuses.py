"""Exit statuses of a worker process that is unfit: what whoever starts the next one may want to know.

0 is an end that was asked for, 1 an error at the start, or one of the worker's own.
"""

from __future__ import annotations

from typing import Final

UNFIT_DEVICE: Final = 70
"""An error of the device that every further call would meet: look at the device before the next start."""

OUT_OF_MEMORY: Final = 71
"""Device memory ran out again and again for single requests; a fresh process begins with all of it."""

UNFIT: Final = 72
"""Not to be trusted any further, for another reason, which the log says: the task said so
(:class:`..tasks.unfit.Unfit`), the end of the host's memory, a group whose ranks are lost again and again.
"""

HUNG: Final = 73
"""A step, or the worker around it, stood still for too long."""
