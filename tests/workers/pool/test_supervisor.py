"""What a supervisor decides: histories of events, and the actions that follow."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perdure.workers.pool.draining import LEAVE
from perdure.workers.pool.places import Action, Ask, Examine, Kill, Phase, Place, Role, Say, Start, Tell, describe
from perdure.workers.pool.restarts import LONGEST_FOR_REQUESTS, LONGEST_PAUSE, RETRY, WINDOW, Budget
from perdure.workers.pool.statuses import OUT_OF_MEMORY, UNFIT_DEVICE
from perdure.workers.pool.supervisor import REPAIR_LOOK, SILENT, VACATE, Supervisor

KILLED = -signal.SIGKILL
LOAD, DRAIN = 100.0, 10.0


@dataclass
class Theatre:
    """A supervisor, its clock, and everything that it has asked for."""

    places: list[Place]
    now: float = 1000.0
    actions: list[Action] = field(default_factory=list)
    running: dict[str, Start] = field(default_factory=dict)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(self.places, LOAD, DRAIN, self.named)
        self.take(self.supervisor.start(self.now))

    def named(self, place: str) -> str:
        self.numbers += 1
        return f"{place}-{self.numbers}"

    def take(self, actions: Sequence[Action]) -> Sequence[Action]:
        self.actions += actions
        for action in actions:
            if isinstance(action, Start):
                assert action.run not in self.running
                self.running[action.run] = action
        return actions

    def tick(self, seconds: float = 0.0) -> Sequence[Action]:
        self.now += seconds
        return self.take(self.supervisor.tick(self.now))

    def ready(self, *runs: str, standing: str = "1") -> Sequence[Action]:
        return self.take(self.supervisor.seen(self.now, dict.fromkeys(runs, standing)))

    def die(self, run: str, status: int = KILLED, held: int | None = 0) -> Sequence[Action]:
        """It ends, and held so many requests; returns all that follows."""
        del self.running[run]
        actions = list(self.take(self.supervisor.gone(self.now, run, status)))
        if Ask(run) in actions:
            actions += self.take(self.supervisor.judged(self.now, run, held))
        return actions

    def up(self) -> bool:
        return self.supervisor.up

    def done(self) -> bool:
        return self.supervisor.done

    def started(self) -> list[str]:
        return [action.run for action in self.actions if isinstance(action, Start)]

    def said(self, level: int = logging.ERROR) -> str:
        return "\n".join(action.text for action in self.actions if isinstance(action, Say) and action.level >= level)


def starts(actions: Sequence[Action]) -> list[str]:
    return [action.run for action in actions if isinstance(action, Start)]


def one() -> Theatre:
    return Theatre([Place("a")])


def test_every_place_is_started_and_up_when_ready() -> None:
    """Up means that the heartbeat says ready, not that a process runs."""
    stage = Theatre([Place("reaper", Role.REAPER), Place("a"), Place("b")])
    assert stage.started() == ["reaper-1", "a-2", "b-3"]
    stage.ready("a-2")
    assert not stage.up()
    stage.ready("a-2", "b-3")
    assert stage.up()
    assert stage.supervisor.summary() == "2 of 2 workers ready"


def test_one_that_does_not_become_ready_is_killed_and_counted() -> None:
    """The load timeout is a bound, and the message names the setting."""
    stage = one()
    assert Kill("a-1") not in stage.tick(LOAD)
    assert Kill("a-1") in stage.tick(1)
    assert "PERDURE_LOAD_TIMEOUT" in stage.said()
    assert stage.tick(1) == []
    assert starts(stage.die("a-1")) == []
    assert stage.places[0].budget.failures == 1
    assert starts(stage.tick(0.5)) == ["a-2"]


def test_loading_is_not_timed_while_redis_does_not_answer() -> None:
    """Nobody could see that it became ready; and no other is started, which could not begin."""
    stage = Theatre([Place("a"), Place("b")])
    for _ in range(50):
        stage.now += LOAD
        stage.take(stage.supervisor.seen(stage.now, None))
        assert stage.tick() == []
    assert starts(stage.die("b-2", 1, held=None)) == []
    assert starts(stage.tick(1000)) == []
    stage.take(stage.supervisor.seen(stage.now, None))
    stage.ready("a-1")
    assert starts(stage.tick()) == ["b-3"]
    assert stage.places[1].budget.ends == [], "an outage speaks against no place"


def test_a_worker_that_stood_is_replaced_at_once() -> None:
    """Killed from outside after a while: nothing to wait for."""
    stage = one()
    stage.ready("a-1")
    stage.now += 60
    assert starts(stage.die("a-1", held=3)) == ["a-2"]


def test_the_fourth_failure_to_start_is_quarantined() -> None:
    """Half a second, one, two; then it is left alone, loudly, with the next command."""
    stage = one()
    for number, pause in enumerate((0.5, 1, 2), start=1):
        assert starts(stage.die(f"a-{number}", 1)) == []
        assert starts(stage.tick(pause - 0.01)) == []
        assert starts(stage.tick(0.01)) == [f"a-{number + 1}"]
    stage.die("a-4", 1)
    (place,) = stage.places
    assert place.phase is Phase.QUARANTINED
    assert "exit status 1" in place.reason
    assert "a is QUARANTINED" in stage.said()
    assert "start the pool again" in stage.said()
    assert starts(stage.tick(RETRY - 1)) == []


def test_slow_failures_to_start_are_quarantined_too() -> None:
    """A model that fails after two minutes never dies three times a minute."""
    stage = one()
    for number in range(1, 5):
        assert stage.places[0].phase is not Phase.QUARANTINED
        stage.now += 120
        stage.ready()
        stage.die(f"a-{number}", 1)
        stage.tick(30)
    assert stage.places[0].phase is Phase.QUARANTINED


def test_ends_that_are_long_past_do_not_count() -> None:
    """Four ends, one every half minute, are not more than three a minute."""
    stage = one()
    for number in range(1, 9):
        stage.ready(f"a-{number}")
        stage.now += WINDOW / 2
        assert starts(stage.die(f"a-{number}")) == [f"a-{number + 1}"]


@pytest.mark.parametrize(
    ("status", "held"), [(-signal.SIGSEGV, 1), (KILLED, 8), (OUT_OF_MEMORY, 0), (-signal.SIGABRT, None), (0, 0)]
)
def test_what_requests_do_to_workers_never_costs_a_place(status: int, held: int | None) -> None:
    """A poison has counts of its own; a worker out of memory, one that was asked to leave: the same."""
    stage = Theatre([Place("a"), Place("b")])
    for _ in range(30):
        run = stage.places[0].run
        stage.ready(run)
        stage.die(run, status, held)
        stage.tick(LONGEST_FOR_REQUESTS)
        assert stage.places[0].run, "started again, soon"
    assert stage.places[0].budget.ends == []


def test_ends_while_ready_do_not_quarantine_the_last_place() -> None:
    """Only what speaks against the place for certain takes a pool's last worker away."""
    stage = Theatre([Place("a"), Place("b")])
    for name in ("a", "b"):
        place = next(place for place in stage.places if place.name == name)
        for _ in range(6):
            stage.ready(place.run)
            if place.run:
                stage.die(place.run)
            stage.tick(1)
    a, b = stage.places
    assert a.phase is Phase.QUARANTINED
    assert b.phase is Phase.WAITING
    assert "pool's last" in stage.said()
    assert starts(stage.tick(LONGEST_PAUSE)) != []


def test_a_quarantined_place_is_tried_once_now_and_then() -> None:
    """A share that is mounted again needs no person; one that is not costs one start, less and less often."""
    stage = one()
    for _ in range(4):
        stage.die(stage.places[0].run, 1)
        stage.tick(30)
    assert stage.places[0].phase is Phase.QUARANTINED
    (run,) = starts(stage.tick(RETRY))
    stage.die(run, 1)
    assert stage.places[0].phase is Phase.QUARANTINED
    assert starts(stage.tick(RETRY)) == []
    (run,) = starts(stage.tick(RETRY))
    stage.ready(run)
    stage.now += 60
    assert starts(stage.die(run)) != [], "it has been ready: everything is as before"


def test_a_person_releases_quarantined_places() -> None:
    """With a full budget again."""
    stage = one()
    for _ in range(4):
        stage.die(stage.places[0].run, 1)
        stage.tick(30)
    (run,) = starts(stage.take(stage.supervisor.released(stage.now)))
    stage.die(run, 1)
    assert stage.places[0].phase is Phase.WAITING


def test_the_reaper_is_always_started_again() -> None:
    """Without it guardians sweep, so that it needs no quarantine; it must not use up the machine either."""
    stage = Theatre([Place("reaper", Role.REAPER)])
    for _ in range(20):
        stage.die(stage.places[0].run, 1)
        assert starts(stage.tick(LONGEST_PAUSE)) != []


# --- spares ----------------------------------------------------------------------------------------------


def with_spare() -> Theatre:
    stage = Theatre([Place("a"), Place("s", Role.SPARE)])
    assert [action.role for action in stage.running.values()] == [Role.WORKER, Role.SPARE]
    stage.ready("a-1")
    stage.ready("s-2", standing="spare")
    assert stage.supervisor.summary() == "1 of 1 workers ready; 1 spare"
    return stage


def test_a_spare_takes_over_at_once_and_another_is_started() -> None:
    """Before anybody has asked what the dead one held."""
    stage = with_spare()
    stage.now += 60
    del stage.running["a-1"]
    actions = stage.take(stage.supervisor.gone(stage.now, "a-1", KILLED))
    assert Tell("s-2", signal.SIGUSR1) in actions
    assert starts(actions) == ["s-3"]
    assert [place.run for place in stage.places] == ["s-2", "s-3"]
    stage.take(stage.supervisor.judged(stage.now, "a-1", 2))
    assert not stage.up()
    stage.ready("s-2")
    assert stage.up()
    assert starts(stage.die("s-2", held=1)) == ["a-4"], "the other spare has not loaded yet"


def test_a_spare_that_is_told_twice_is_told_once() -> None:
    """Two workers die, one spare: the second place starts a process of its own."""
    stage = Theatre([Place("a"), Place("b"), Place("s", Role.SPARE)])
    stage.ready("a-1", "b-2")
    stage.ready("s-3", standing="spare")
    stage.now += 60
    stage.die("a-1")
    assert starts(stage.die("b-2")) == ["b-5"]
    assert stage.actions.count(Tell("s-3", signal.SIGUSR1)) == 1


def test_a_spare_helps_a_place_that_waits_to_be_started_again() -> None:
    """As soon as it has loaded."""
    stage = Theatre([Place("a"), Place("s", Role.SPARE)])
    stage.die("a-1", 1)
    assert Tell("s-2", signal.SIGUSR1) in stage.ready("s-2", standing="spare")


def test_spares_stay_on_their_device() -> None:
    """A spare of another GPU has its model there."""
    stage = Theatre([Place("g0", device=0), Place("s", Role.SPARE, device=1)])
    for name in ("g0", "s"):
        stage.take(stage.supervisor.examined(stage.now, name, "NONE", occupied=False))
    stage.ready("g0-1")
    stage.ready("s-2", standing="spare")
    stage.now += 60
    stage.die("g0-1")
    assert not any(isinstance(action, Tell) for action in stage.actions)


# --- devices ---------------------------------------------------------------------------------------------


def on_gpus() -> Theatre:
    stage = Theatre([Place("g0", device=0), Place("g1", device=1), Place("s", Role.SPARE, device=0)])
    assert stage.actions == [Examine("g0", 0), Examine("g1", 1), Examine("s", 0)]
    for place in stage.places:
        stage.take(stage.supervisor.examined(stage.now, place.name, "NONE", occupied=False))
    stage.ready("g0-1", "g1-2")
    stage.ready("s-3", standing="spare")
    stage.now += 60
    return stage


def test_a_successor_waits_for_the_device() -> None:
    """Its memory is not free before. Bounded: then it starts all the same, with a warning."""
    stage = on_gpus()
    assert stage.die("g1-2")[-1] == Examine("g1", 1)
    waited = 0.0
    while not starts(stage.take(stage.supervisor.examined(stage.now, "g1", "NONE", occupied=True))):
        assert waited <= VACATE
        waited += 0.25
        assert Examine("g1", 1) in stage.tick(0.25)
    assert waited >= VACATE
    assert "old process is still on GPU 1" in stage.said(logging.WARNING)
    stage.die("g1-4", 1)
    stage.tick(0.5)
    assert starts(stage.take(stage.supervisor.examined(stage.now, "g1", "NONE", occupied=False))) == ["g1-5"]


def test_a_driver_that_does_not_answer_is_not_waited_for() -> None:
    """The call may never come back; the pool goes on without its verdict."""
    stage = on_gpus()
    stage.die("g1-2")
    assert starts(stage.tick(SILENT)) == []
    assert starts(stage.tick(0.1)) == ["g1-4"]
    assert starts(stage.take(stage.supervisor.examined(stage.now, "g1", "NONE", occupied=False))) == []


def test_after_a_device_error_the_driver_is_asked_first() -> None:
    """Fit: another one, and it counts. The spare's process may take over, but not before the answer."""
    stage = on_gpus()
    stage.now -= 59  # so soon after its start that it has to wait; the driver is asked at once all the same
    actions = stage.die("g0-1", UNFIT_DEVICE, held=0)
    assert Examine("g0", 0) in actions
    assert not any(isinstance(action, Tell) for action in actions)
    assert not any(isinstance(action, Tell) for action in stage.ready())
    assert stage.take(stage.supervisor.examined(stage.now, "g0", "NONE", occupied=False)) == []
    assert Tell("s-3", signal.SIGUSR1) in stage.tick(0.5)
    assert len(stage.places[0].budget.ends) == 1


@pytest.mark.parametrize(
    ("action", "command"),
    [("GPU_RESET", "nvidia-smi --gpu-reset -i 0"), ("NODE_REBOOT", "reboot"), ("DRAIN_AND_RESET", "-i 0")],
)
def test_a_device_that_needs_repair_is_quarantined(action: str, command: str) -> None:
    """At once, with its spare, which would keep it from being reset; released when the driver is content."""
    stage = on_gpus()
    stage.die("g0-1", UNFIT_DEVICE)
    actions = stage.take(stage.supervisor.examined(stage.now, "g0", action, occupied=False))
    assert actions[-1:] != []
    assert stage.places[0].phase is Phase.QUARANTINED
    assert Tell("s-3", signal.SIGTERM) in actions
    assert stage.places[1].phase is Phase.READY
    assert action in stage.said()
    assert command in stage.said()
    stage.die("s-3", 0)
    assert stage.places[2].phase is Phase.QUARANTINED
    assert stage.up()
    asked = stage.tick(REPAIR_LOOK)
    assert asked == [Examine("g0", 0), Examine("s", 0)]
    stage.take(stage.supervisor.examined(stage.now, "g0", action, occupied=False))
    assert stage.places[0].phase is Phase.QUARANTINED
    assert Examine("g0", 0) in stage.tick(REPAIR_LOOK)
    stage.take(stage.supervisor.examined(stage.now, "g0", "NONE", occupied=False))
    assert starts(stage.take(stage.supervisor.examined(stage.now, "g0", "NONE", occupied=False))) == ["g0-4"]


def test_device_errors_that_the_driver_denies_use_up_the_budget() -> None:
    """Four in a minute, also with requests in flight: something is wrong there all the same."""
    stage = Theatre([Place("g0", device=0)])
    for number in range(1, 5):
        stage.tick(3)
        stage.take(stage.supervisor.examined(stage.now, "g0", "NONE", occupied=False))
        stage.ready(f"g0-{number}")
        stage.die(f"g0-{number}", UNFIT_DEVICE, held=5)
    assert stage.places[0].phase is Phase.QUARANTINED
    assert "a device error" in stage.said()


# --- the end ---------------------------------------------------------------------------------------------


def test_stopping_drains_workers_then_the_reaper() -> None:
    """SIGTERM; what is late is killed with its group; the reaper hands on what workers could not."""
    stage = Theatre([Place("reaper", Role.REAPER), Place("a"), Place("b")])
    assert stage.take(stage.supervisor.stop(stage.now)) == [Tell("a-2", signal.SIGTERM), Tell("b-3", signal.SIGTERM)]
    assert stage.die("a-2", 0) == []
    assert stage.tick(DRAIN) == []
    assert Kill("b-3") in stage.tick(LEAVE)
    assert stage.tick(1) == [], "once"
    assert stage.die("b-3") == [Tell("reaper-1", signal.SIGTERM)]
    assert not stage.done()
    stage.die("reaper-1", 0)
    assert stage.done()
    assert stage.supervisor.killed == 1


def test_a_second_stop_waits_for_no_step_and_a_third_kills() -> None:
    """A worker takes a second signal within a second for an echo: it is sent later."""
    stage = Theatre([Place("reaper", Role.REAPER), Place("a")])
    stage.take(stage.supervisor.stop(stage.now))
    stage.now += 0.2
    assert stage.take(stage.supervisor.stop(stage.now)) == []
    assert stage.tick(1) == [Tell("a-2", signal.SIGTERM)]
    assert Kill("a-2") in stage.take(stage.supervisor.stop(stage.now))
    stage.die("a-2")
    assert Kill("reaper-1") in stage.tick()
    stage.die("reaper-1")
    assert stage.done()


def test_nothing_is_started_after_a_stop() -> None:
    """Neither what was due, nor what is examined, judged or released."""
    stage = on_gpus()
    stage.die("g1-2")
    del stage.running["g0-1"]
    stage.take(stage.supervisor.gone(stage.now, "g0-1", UNFIT_DEVICE))
    before = len(stage.started())
    stage.take(stage.supervisor.stop(stage.now))
    stage.take(stage.supervisor.judged(stage.now, "g0-1", 0))
    stage.take(stage.supervisor.examined(stage.now, "g1", "NONE", occupied=False))
    stage.take(stage.supervisor.released(stage.now))
    stage.tick(1000)
    stage.ready("s-3", standing="spare")
    assert len(stage.started()) == before


EVENTS = ("tick", "tick", "ready", "spare", "die", "die", "outage", "examined", "release", "judged")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 7), st.integers(0, 7)), max_size=60))
def test_whatever_happens_in_whatever_order(history: list[tuple[str, int, int]]) -> None:
    """One process to a place; a stopped pool ends; a pool that is left alone is up again or quarantined."""
    stage = Theatre(
        [
            Place("reaper", Role.REAPER), Place("a"), Place("g", device=0), Place("s", Role.SPARE),
            Place("t", Role.SPARE, device=0),
        ]
    )  # fmt: skip
    owed: list[str] = []
    for event, x, y in history:
        runs = sorted(stage.running)
        run = runs[x % len(runs)] if runs else ""
        stage.now += x / 4
        match event:
            case "tick":
                stage.tick(y * y)
            case "ready" | "spare" if run:
                stage.ready(run, standing="1" if event == "ready" else "spare")
            case "die" if run:
                del stage.running[run]
                actions = stage.take(stage.supervisor.gone(stage.now, run, (KILLED, 0, 1, UNFIT_DEVICE)[y % 4]))
                owed += [action.run for action in actions if isinstance(action, Ask)]
            case "judged" if owed:
                stage.take(stage.supervisor.judged(stage.now, owed.pop(x % len(owed)), (0, 1, None)[y % 3]))
            case "outage":
                stage.take(stage.supervisor.seen(stage.now, None))
            case "examined":
                action = ("NONE", "NONE", "GPU_RESET", "UNKNOWN")[y % 4]
                stage.take(stage.supervisor.examined(stage.now, ("g", "t")[x % 2], action, occupied=y > 5))
            case "release":
                stage.take(stage.supervisor.released(stage.now))
            case _:
                pass
        filled = [place.run for place in stage.places if place.run]
        assert sorted(filled) == sorted(stage.running), "every process has one place, every place one process at most"
        for place in stage.places:
            assert bool(place.run) == (place.phase in (Phase.STARTING, Phase.READY, Phase.SPARE, Phase.ENDING)), place
    for run in owed:
        stage.take(stage.supervisor.judged(stage.now, run, 1))
    for _ in range(40):  # nothing more happens: everything that is no worse than slow comes back
        stage.now += 2 * RETRY
        for name in ("g", "t"):
            stage.take(stage.supervisor.examined(stage.now, name, "NONE", occupied=False))
        stage.ready(*[place.run for place in stage.places if place.role is Role.WORKER])
        stage.ready(*[place.run for place in stage.places if place.role is Role.SPARE], standing="spare")
        for place in stage.places:
            if place.phase is Phase.ENDING:
                stage.die(place.run)
        stage.tick()
    assert stage.up()
    stage.take(stage.supervisor.stop(stage.now))
    for run in sorted(stage.running, key=lambda run: run.startswith("reaper")):
        stage.die(run, 0)
    assert stage.done()


def test_pauses_are_bounded_however_long_it_goes_on() -> None:
    budget = Budget()
    assert max(budget.ended(at, ready=None, counts=True) for at in range(5000)) == LONGEST_PAUSE
    assert len(budget.ends) <= WINDOW + 1


def test_an_ending_is_told_in_words() -> None:
    """Exit statuses and signals are named; a signal without a name keeps its number."""
    assert describe(0) == "exit status 0"
    assert describe(UNFIT_DEVICE) == "exit status 70 (a device error)"
    assert describe(KILLED) == "signal SIGKILL"
    assert describe(-200) == "signal 200"
