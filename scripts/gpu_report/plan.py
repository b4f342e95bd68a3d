"""The steps of the report, the most valuable first, and the seconds that each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .place import SECONDS as INSTALLATION

TOTAL: Final = 480.0
"""Seconds that the whole report may take, the installation and the end of what a step leaves behind among them."""

REHEARSAL: Final = 4.0
"""Times longer that a step, and all of it, may take in a rehearsal: on a CPU, which others use too."""

_MODULES: Final = f"{__package__}.steps"


@dataclass(frozen=True, slots=True)
class ReportStep:
    """One step: ``target`` is ``module:function``, called with a ``ReportStage`` in a process of its own."""

    name: str
    title: str
    seconds: float
    target: str


STEPS: Final = (
    ReportStep("machine", "The machine, and what a process pays before it computes", 20, f"{_MODULES}.device:machine"),
    ReportStep("tests", "The tests marked gpu", 65, f"{_MODULES}.promises:gpu_tests"),
    ReportStep("resume", "Answers that go on from random tokens", 55, f"{_MODULES}.promises:resume"),
    ReportStep("kill", "kill -9 of a worker at full batch", 70, f"{_MODULES}.recovery:kill"),
    ReportStep("speed", "Tokens/s with checkpoints and without, in turn", 135, f"{_MODULES}.speed:speed"),
    ReportStep("memory", "Memory that runs out", 25, f"{_MODULES}.faults:memory"),
    ReportStep("driver", "The driver, the health check and the known-answer probe", 20, f"{_MODULES}.device:driver"),
    ReportStep("spin", "A step that never ends", 20, f"{_MODULES}.faults:spin"),
    ReportStep("fault", "An illegal memory access", 20, f"{_MODULES}.faults:fault"),
    ReportStep("ranks", "Two ranks on one device, and a group that forms anew", 20, f"{_MODULES}.ranks:ranks"),
)


def bound(steps: Sequence[ReportStep] = STEPS) -> float:
    """Seconds that all of it takes at most."""
    return INSTALLATION + sum(step.seconds for step in steps)
