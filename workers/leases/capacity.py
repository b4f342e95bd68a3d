"""What the tasks that a worker has loaded allow: how many requests it holds at once, and how long one step takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ...protocol.settings import Settings


@dataclass(slots=True)
class Capacity:
    """Behind the lock of the holdings: what the engine loop calls takes it, the courier holds it."""

    settings: Settings
    lock: threading.Condition
    changed: Callable[[], None]
    """Called, with the lock, when there may be room for more."""
    slots: dict[str, int] = field(default_factory=dict)
    """Loaded task -> how many of its requests fit."""
    limits: dict[str, int] = field(default_factory=dict)
    """What limits the slots for a while, by name; the smallest rules."""
    _step_timeouts: dict[str, float | None] = field(default_factory=dict)
    _settings: dict[float | None, Settings] = field(default_factory=dict)
    """Those of :meth:`task_settings`, by step timeout: they are checked when they are made."""

    # --- for the engine loop -----------------------------------------------------------------------

    def loaded(self, path: str, slots: int, step_timeout: float | None) -> None:
        """A task is ready: how many of its requests fit, and how long one of its steps may take (seconds)."""
        with self.lock:
            self.slots[path] = slots
            self._step_timeouts[path] = step_timeout
            self.changed()

    def resize(self, path: str, slots: int) -> None:
        """A step that cannot be ended occupies a slot of a task, or has come back and frees it."""
        with self.lock:
            if self.slots.get(path) != slots:
                self.slots[path] = slots
                self.changed()

    def limit(self, name: str, slots: int | None) -> None:
        """Hold at most so many requests, at least 1, for the reason of this name; ``None`` lifts that limit.

        What is held already stays.
        """
        with self.lock:
            if self.limits.get(name) == slots:
                return
            if slots is None:
                del self.limits[name]
            else:
                self.limits[name] = max(1, slots)
            self.changed()

    # --- for the courier (lock held) ---------------------------------------------------------------

    def limited(self, slots: int) -> int:
        """So many slots, or as few as the limits leave of them."""
        return min([slots, *self.limits.values()])

    def step_timeout(self, task: str) -> float:
        """Seconds that a step of this task may take."""
        return self._step_timeouts.get(task) or self.settings.step_timeout

    def task_settings(self, task: str) -> Settings:
        """The settings with the step timeout of this task: leases depend on it."""
        timeout = self._step_timeouts.get(task)
        if timeout not in self._settings:
            self._settings[timeout] = self.settings.replace(step_timeout=timeout)
        return self._settings[timeout]
