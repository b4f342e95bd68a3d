"""What tests of GPUs share: a driver that is a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.places import TESTS

FAKE = TESTS / "fake_nvml"
"""On PYTHONPATH of what is to find the fake in place of the real package."""


class FakeDriver:
    """Devices as the fake shows them; :meth:`set` changes one for every process that looks."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.state: dict[str, Any] = {"driver": True, "devices": [{}]}
        self.write()

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to see these devices, besides ``PYTHONPATH``."""
        return {"FAKE_NVML": str(self.file)}

    @property
    def watched(self) -> Path:
        """Is there once a process waits for events; those before are not heard of."""
        return self.file.with_suffix(".watched")

    def devices(self, *facts: dict[str, Any]) -> None:
        """Have exactly these devices."""
        self.state["devices"] = list(facts)
        self.write()

    def set(self, index: int = 0, **facts: Any) -> None:
        """Change what one device shows."""
        self.state["devices"][index] |= facts
        self.write()

    def write(self) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.state))
        new.replace(self.file)  # whoever reads finds the old or the new one


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """The fake driver, in this process too."""
    made = FakeDriver(tmp_path / "nvml.json")
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("FAKE_NVML", str(made.file))
    real = sys.modules.pop("pynvml", None)
    yield made
    sys.modules.pop("pynvml", None)
    if real is not None:
        sys.modules["pynvml"] = real
