"""The supervisor's decisions: which process is started, told, killed, and which place is left alone.

1. start: a process for each place, as soon as its device is free and fit.
2. watch: one that does not become ready in time is killed; one that ended is replaced, by a loaded spare at once.
3. back off: pauses grow, and a place that ends too often by itself, or whose device needs repair, is quarantined.
4. stop: SIGTERM, the drain timeout, then SIGKILL to whole process groups; the reaper last.

Events come in as calls with the time, actions come out; :mod:`perdure.scripts.pool.pool` is the edge that carries
them out. It never touches a request: whatever a dead worker held is its guardian's business, so that the two can fail
independently.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from .draining import Drain
from .places import Action, Ask, Examine, Kill, Phase, Place, Role, Say, Start, Tell, describe
from .restarts import BUDGET, LONGEST_PAUSE, WINDOW
from .statuses import HUNG, OUT_OF_MEMORY, UNFIT, UNFIT_DEVICE

VACATE: Final = 10.0
"""Seconds that a successor waits for the old process to be gone from the device."""

LOOK_AGAIN: Final = 0.2
"""Seconds between two looks at a device that somebody is still on."""

SILENT: Final = 5.0
"""Seconds without an answer about a device after which nothing is waited for: the driver hangs."""

REPAIR_LOOK: Final = 10.0
"""Seconds between two looks at a quarantined device: whether it has been repaired."""

USABLE: Final = frozenset({"", "NONE", "UNKNOWN", "DRAIN_P2P", "RECOVER_IMEX_DOMAIN"})
"""Recovery actions of the driver under which a process that computes alone may be started."""

REPAIRS: Final[Mapping[str, str]] = {
    "GPU_RESET": "stop what uses it, then run: nvidia-smi --gpu-reset -i {index}",
    "DRAIN_AND_RESET": "let what uses it end, then run: nvidia-smi --gpu-reset -i {index}",
    "NODE_REBOOT": "reboot this host",
    "SYSTEM_REBOOT": "reboot this host",
    "BUS_RESET": "reset its bus: power this host off and on",
}
"""What a person does about a recovery action."""


@dataclass(slots=True)
class Supervisor:
    """Decides for all places of one pool. Every call returns what is to be done, in this order."""

    places: list[Place]
    load_timeout: float
    """Seconds from a start until it must be ready."""
    drain_timeout: float
    name: Callable[[str], str]
    """Gives the next process of a place a name that no other has."""
    release: str = "start the pool again"
    """What a person types to release quarantined places."""
    _blind: bool = False
    _last_look: float = 0.0
    _drain: Drain = field(init=False)
    _actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._drain = Drain(self.drain_timeout)

    # --- events --------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """Begin: every place is due."""
        self._last_look = now
        return self.tick(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed: call it often."""
        if self._drain.stops:
            self._actions += self._drain.press(now, self.places)
        else:
            for place in self.places:
                self._tend(place, now)
        return self._taken()

    def seen(self, now: float, standings: Mapping[str, str] | None) -> list[Action]:
        """What Redis says of the processes, by name: ``1`` ready, ``spare`` loaded; ``None``: it does not answer.

        While it does not, nothing is started (a worker could not begin), and no loading is timed (nobody could see
        its end).
        """
        passed, self._last_look = now - self._last_look, now
        self._blind = standings is None
        for place in self.places:
            if place.phase is not Phase.STARTING:
                continue
            standing = standings.get(place.run) if standings is not None else None
            if standings is None:
                place.since += passed
            elif standing == "1" or (standing == "spare" and place.role is Role.SPARE):
                self._say(logging.INFO, f"{place.name} ({place.run}) is ready after {now - place.since:.1f} s")
                place.phase, place.since = (Phase.READY if standing == "1" else Phase.SPARE), now
                place.budget.stood()
        for place in self.places:
            examined_first = place.device is not None and place.end[1] == UNFIT_DEVICE
            if (
                place.role is Role.WORKER
                and place.phase is Phase.WAITING
                and not self._drain.stops
                and not examined_first
            ):
                self._take_over(place, now)
        return self._taken()

    def gone(self, now: float, run: str, status: int) -> list[Action]:
        """A process has ended, and its whole group with it; ``status`` as :mod:`subprocess` gives it."""
        place = next((place for place in self.places if place.run == run), None)
        if place is None:
            return self._taken()
        ready = now - place.since if place.phase in (Phase.READY, Phase.SPARE) else None
        place.run, place.end = "", (run, status, ready)
        ending, place.phase, place.since = place.phase is Phase.ENDING, Phase.JUDGED, now
        place.look_anew()
        if self._drain.stops:
            place.phase = Phase.STOPPED
            self._actions += self._drain.press(now, self.places)
        elif place.repair:
            place.phase, place.due = Phase.QUARANTINED, now + REPAIR_LOOK
        elif place.role is Role.REAPER:
            self._again(place, now, place.budget.ended(now, ready=ready, counts=True), describe(status))
        else:
            if place.role is Role.WORKER and status != UNFIT_DEVICE and not ending:
                self._take_over(place, now)
            self._actions.append(Ask(run))
        return self._taken()

    def judged(self, now: float, run: str, held: int | None) -> list[Action]:
        """How many requests a process held when it ended; ``None``: Redis does not answer, and nothing counts."""
        place = next((place for place in self.places if place.end[0] == run), None)
        if place is None or self._drain.stops or place.phase is Phase.QUARANTINED:
            return self._taken()
        _, status, ready = place.end
        counts = status == UNFIT_DEVICE or (
            held == 0
            and status not in (OUT_OF_MEMORY, UNFIT, HUNG)  # by what it ran, and it has handed all back
            and not (status == 0 and ready is not None)  # somebody asked it to leave
        )
        pause = place.budget.ended(now, ready=ready, counts=counts)
        if place.phase is not Phase.JUDGED:
            return self._taken()  # a spare has taken over
        why = place.reason or describe(status)
        place.reason = ""
        if counts and place.budget.exhausted(now):
            if ready is None or status == UNFIT_DEVICE or self._others(place):
                self._quarantine_for_ends(place, now, why)
                return self._taken()
            pause = LONGEST_PAUSE
            self._say(logging.ERROR, f"{place.name} ends again and again, but is the pool's last: not quarantined")
        self._again(place, now, pause, why)
        return self._taken()

    def examined(self, now: float, name: str, action: str, *, occupied: bool) -> list[Action]:
        """What the driver says of a place's device: its recovery action, and whether an old process is on it."""
        place = next(place for place in self.places if place.name == name)
        place.asked = None
        if self._drain.stops:
            return self._taken()
        if place.phase is Phase.QUARANTINED and place.repair and action in ("", "NONE"):
            self._say(logging.WARNING, f"{name}: GPU {place.device} needs no repair any more; released")
            self._released(place, now)
        elif place.phase is Phase.WAITING and action not in USABLE:
            self._quarantine_device(place, now, action)
        elif place.phase is Phase.WAITING and not place.clear:
            began = now if place.examining is None else place.examining
            if occupied and now - began < VACATE:
                place.due = max(place.due, now + LOOK_AGAIN)
            else:
                if occupied:
                    self._say(
                        logging.WARNING,
                        f"{name}: an old process is still on GPU {place.device} after {VACATE:g} s; "
                        "starting all the same",
                    )
                place.clear = True
                self._tend(place, now)
        return self._taken()

    def released(self, now: float) -> list[Action]:
        """A person releases all quarantined places."""
        for place in self.places:
            if place.phase is Phase.QUARANTINED:
                self._say(logging.WARNING, f"{place.name} is released")
                place.budget.forgive()
                self._released(place, now)
        return self._taken()

    def stop(self, now: float) -> list[Action]:
        """Drain; the second time, do not wait for running steps; the third time, kill."""
        if not self._drain.stops:
            for place in self.places:
                place.phase = Phase.ENDING if place.run else Phase.STOPPED
        self._actions += self._drain.ask(now, self.places)
        return self._taken()

    # --- what is known -------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether a stopped pool has no process left."""
        return self._drain.stops > 0 and not any(place.run for place in self.places)

    @property
    def killed(self) -> int:
        """Processes that outlived the drain and were killed."""
        return self._drain.killed

    @property
    def up(self) -> bool:
        """Whether every worker's place is ready or quarantined, and one at least is ready."""
        phases = [place.phase for place in self.places if place.role is Role.WORKER]
        return Phase.READY in phases and set(phases) <= {Phase.READY, Phase.QUARANTINED}

    def summary(self) -> str:
        """One line for people."""
        workers = [place for place in self.places if place.role is Role.WORKER]
        ready = sum(place.phase is Phase.READY for place in workers)
        parts = [f"{ready} of {len(workers)} workers ready"]
        if spares := sum(place.phase is Phase.SPARE for place in self.places):
            parts.append(f"{spares} spare")
        if out := [place.name for place in self.places if place.phase is Phase.QUARANTINED]:
            parts.append(f"quarantined: {', '.join(out)}")
        return ("stopping; " if self._drain.stops else "") + "; ".join(parts)

    # --- within --------------------------------------------------------------------------------------

    def _taken(self) -> list[Action]:
        taken, self._actions = self._actions, []
        return taken

    def _say(self, level: int, text: str) -> None:
        self._actions.append(Say(level, text))

    def _tend(self, place: Place, now: float) -> None:
        if place.phase is Phase.STARTING and place.role is not Role.REAPER:
            if now - place.since > self.load_timeout:
                place.phase, place.reason = Phase.ENDING, f"not ready after {self.load_timeout:g} s"
                self._say(
                    logging.ERROR,
                    f"{place.name} ({place.run}) is {place.reason}; killed. If its tasks need longer to load, raise "
                    "PERDURE_LOAD_TIMEOUT",
                )
                self._actions.append(Kill(place.run))
        elif place.phase is Phase.QUARANTINED and now >= place.due:
            if place.repair:
                self._examine(place, now)
                place.due = now + REPAIR_LOOK
            else:
                place.budget.try_again()
                self._say(logging.WARNING, f"{place.name} is quarantined no more, for one try")
                self._released(place, now)
        elif place.phase is Phase.WAITING and now >= place.due and not self._blind:
            if place.device is None or place.clear:
                self._start(place, now)
            elif place.asked is not None and now - place.asked > SILENT:
                self._say(logging.WARNING, f"{place.name}: no answer about GPU {place.device}; starting all the same")
                self._start(place, now)
            else:
                self._examine(place, now)

    def _examine(self, place: Place, now: float) -> None:
        """One question at a time; its answer may be waited for, but not for ever."""
        if place.asked is None and place.device is not None:
            place.asked = now
            place.examining = now if place.examining is None else place.examining
            self._actions.append(Examine(place.name, place.device))

    def _start(self, place: Place, now: float) -> None:
        if place.role is Role.WORKER and self._take_over(place, now):
            return
        place.run = self.name(place.name)
        place.phase, place.since, place.clear = Phase.STARTING, now, False
        if place.role is Role.REAPER:
            place.phase = Phase.READY  # it answers to nobody
        self._actions.append(Start(place.run, place.role, place.device))

    def _take_over(self, place: Place, now: float) -> bool:
        """Let a loaded spare on the same device be this place's process from now on; False if there is none."""
        spare = next((it for it in self.places if it.phase is Phase.SPARE and it.device == place.device), None)
        if spare is None:
            return False
        self._say(logging.WARNING, f"{place.name}: the spare {spare.run} takes over")
        self._actions.append(Tell(spare.run, signal.SIGUSR1))
        place.run, place.phase, place.since = spare.run, Phase.STARTING, now
        spare.run, spare.phase, spare.since, spare.due = "", Phase.WAITING, now, now
        spare.look_anew()
        place.look_anew()
        self._tend(spare, now)
        return True

    def _again(self, place: Place, now: float, pause: float, why: str) -> None:
        place.phase, place.since, place.due = Phase.WAITING, now, now + pause
        when = f"again in {pause:g} s" if pause else "starting another"
        self._say(logging.WARNING, f"{place.name} ({place.end[0]}) ended: {why}; {when}")
        self._examine(place, now)  # during the pause
        self._tend(place, now)

    def _others(self, place: Place) -> bool:
        """Whether another worker's place is in use."""
        return any(
            it is not place and it.role is Role.WORKER and it.phase is not Phase.QUARANTINED for it in self.places
        )

    def _quarantine_for_ends(self, place: Place, now: float, why: str) -> None:
        patience = place.budget.patience()
        place.phase, place.since, place.due, place.repair = Phase.QUARANTINED, now, now + patience, False
        place.reason = (
            f"it ended more than {BUDGET} times within {WINDOW:g} s, or as often in a row, before it was ready or with "
            f"nothing to do; the last end: {why}"
        )
        self._say(
            logging.ERROR,
            f"{place.name} is QUARANTINED: {place.reason}. What it printed says why. "
            f"It is tried again in {patience:g} s; sooner: {self.release}",
        )

    def _quarantine_device(self, place: Place, now: float, action: str) -> None:
        repair = REPAIRS.get(action, "ask the vendor what that means").format(index=place.device)
        for it in self.places:
            if it.device != place.device or it.phase is Phase.QUARANTINED:
                continue
            if it.run and it.role is Role.WORKER:
                continue  # it computes; if it cannot, it will say so
            it.repair, it.reason = True, f"the driver says {action} of GPU {it.device}"
            it.since, it.due = now, now + REPAIR_LOOK
            if it.run:
                it.phase = Phase.ENDING  # a spare keeps the device from being reset
                self._actions.append(Tell(it.run, signal.SIGTERM))
            else:
                it.phase = Phase.QUARANTINED
            self._say(
                logging.ERROR,
                f"{it.name} is QUARANTINED: {it.reason}: {repair}. "
                f"It is released by itself once the driver is content; sooner: {self.release}",
            )

    def _released(self, place: Place, now: float) -> None:
        place.phase, place.since, place.due, place.repair, place.reason = Phase.WAITING, now, now, False, ""
        place.look_anew()
        self._tend(place, now)
