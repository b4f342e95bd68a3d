"""How a check stands after what it has read, and that none keeps another waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.workers.health.state import Check, CheckState, Health, Reading, Shown, Standing
from tests.kit.lab import eventually

OK, DEGRADED, FAIL, UNKNOWN = CheckState.OK, CheckState.DEGRADED, CheckState.FAIL, CheckState.UNKNOWN


def after(*history: Reading | CheckState, silence: str = "") -> Shown:
    """How a check stands after these readings; a bare state is a reading whose reason is its name."""
    standing = Standing()
    for at, item in enumerate(history, 1):
        standing.hear(item if isinstance(item, Reading) else Reading(item, item.value), float(at))
    return standing.shown(silence)


@pytest.mark.parametrize(
    ("history", "state"),
    [
        ((), UNKNOWN),
        ((OK,), OK),
        ((FAIL,), FAIL),  # there is nothing else to believe
        ((FAIL, OK), OK),
        ((OK, OK, FAIL), OK),  # one bad look
        ((OK, FAIL, FAIL), FAIL),
        ((OK, FAIL, OK, FAIL), FAIL),
        ((OK, FAIL, OK, OK, FAIL, OK), OK),
        ((FAIL, FAIL, OK), FAIL),  # one good look
        ((FAIL, FAIL, OK, OK), OK),
        ((OK, DEGRADED, FAIL), DEGRADED),
        ((OK, UNKNOWN), UNKNOWN),
        ((FAIL, FAIL, UNKNOWN), FAIL),  # silence mends nothing
        ((FAIL, FAIL, UNKNOWN, UNKNOWN, UNKNOWN), FAIL),
        ((FAIL, FAIL, UNKNOWN, OK, OK), OK),
    ],
)
def test_two_of_three_readings_change_what_is_told(history: tuple[CheckState, ...], state: CheckState) -> None:
    assert after(*history).state is state


def test_the_reason_is_of_the_last_reading_that_says_so() -> None:
    shown = after(Reading(FAIL, "first"), Reading(FAIL, "second"), Reading(OK, "third"))
    assert shown == Shown(FAIL, "second", 3.0)


def test_silence_is_told_unless_it_would_hide_a_failure() -> None:
    assert after(OK, OK, silence="it hangs").state is UNKNOWN
    assert after(OK, OK, silence="it hangs").reason == "it hangs"
    assert after(FAIL, FAIL, silence="it hangs").state is FAIL


BROKEN = Reading(FAIL, "broken", certain=True)
MENDED = Reading(OK, "mended", certain=True)


@pytest.mark.parametrize(
    ("history", "state"),
    [
        ((OK, OK, OK, BROKEN), FAIL),  # at once
        ((BROKEN, OK, OK, OK, OK), FAIL),  # measurements do not mend it
        ((BROKEN, UNKNOWN, UNKNOWN), FAIL),
        ((BROKEN, MENDED), OK),  # the word of the driver does
        ((BROKEN, Reading(DEGRADED, "it limps", certain=True)), DEGRADED),
        ((BROKEN, MENDED, BROKEN), FAIL),
    ],
)
def test_a_fault_of_the_hardware_ends_only_by_the_drivers_word(
    history: tuple[Reading | CheckState, ...], state: CheckState
) -> None:
    assert after(*history).state is state


READINGS = st.builds(Reading, st.sampled_from(CheckState), st.just(""), st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(READINGS, max_size=12))
def test_what_is_told_follows_from_the_readings(history: list[Reading]) -> None:
    """A condemned check fails; nothing is told that no reading said; equal readings are told as they are."""
    standing = Standing()
    last_certain: Reading | None = None
    for item in history:
        standing.hear(item, 1.0)
        if item.certain and item.state is not UNKNOWN:
            last_certain = item
    shown = standing.shown()
    if last_certain is not None and last_certain.state is FAIL:
        assert shown.state is FAIL
    assert shown.state is UNKNOWN or shown.state in {item.state for item in history}
    for item in [Reading(OK, "", certain=True)] * 3:
        standing.hear(item, 2.0)
    assert standing.shown().state is OK


# --- checks in threads -----------------------------------------------------------------------------------


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """Set at the end of the test, so that what hangs on it ends."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_check_that_hangs_is_told_and_keeps_no_other_waiting(hold: threading.Event) -> None:
    """It is unknown after its deadline, is not started again beside itself, and goes on when it comes back."""
    begun: list[float] = []
    over = threading.Event()

    def hang() -> Reading:
        begun.append(time.monotonic())
        if len(begun) == 2:
            hold.wait(60)
        return fine()

    def fine() -> Reading:
        if over.is_set():
            raise SystemExit  # ends the thread: a check looks for as long as its process lives
        return Reading(OK, "fine")

    hanging = Check("hanging", hang, deadline=0.05)
    other = Check("other", fine, deadline=60)
    hanging.start(0.005)
    other.start(0.005)
    eventually(lambda: hanging.shown().state is UNKNOWN and begun)
    assert "hung for" in eventually(lambda: hanging.shown()).reason
    seen = other.shown().at
    eventually(lambda: other.shown().at > seen)
    assert other.shown().state is OK
    assert len(begun) == 2
    hold.set()
    assert eventually(lambda: hanging.shown().state is OK)
    eventually(lambda: len(begun) > 3)
    over.set()


def test_a_check_that_raises_is_unknown_and_looks_again() -> None:
    looks = iter([ZeroDivisionError("by zero"), None])

    def look() -> Reading:
        error = next(looks)
        if error is not None:
            raise error
        return Reading(OK, "fine")

    check = Check("odd", look, deadline=60)
    check.look()
    assert check.shown().state is UNKNOWN
    assert check.shown().reason == "the check failed: ZeroDivisionError: by zero"
    check.look()
    assert check.shown().state is OK


# --- the three answers -----------------------------------------------------------------------------------


class Fixed:
    """A check that stands as it is told to."""

    def __init__(self, name: str, state: CheckState, condemned: str = "") -> None:
        self.name, self.state, self.condemned = name, state, condemned

    def start(self, interval: float) -> None:
        """Nothing to start."""

    def shown(self) -> Shown:
        return Shown(self.state, "because", 12.3456)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for a signal and leaves with its number."""
    code = (
        "import signal, sys\n"
        "numbers = {signal.SIGUSR2, signal.SIGTERM}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, numbers)\n"
        "print(flush=True)\n"
        "sys.exit(signal.sigwait(numbers))"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


def test_readiness_has_the_promised_shape() -> None:
    health = Health(os.getpid(), [Fixed("disk", DEGRADED), Fixed("gpu", UNKNOWN)], claims=True)
    report = health.report()
    assert set(report) == {"healthy", "checks", "timestamp"}
    assert report["healthy"] is True
    assert report["checks"]["disk"] == {"state": "degraded", "reason": "because", "at": 12.346}
    assert abs(report["timestamp"] - time.time()) < 60
    health.checks.append(Fixed("memory", FAIL))
    assert health.report()["healthy"] is False


def test_a_worker_that_loads_lives_and_is_not_ready() -> None:
    health = Health(os.getpid(), [])
    assert health.live() == ""
    assert health.report()["healthy"] is False
    assert health.report()["checks"]["worker"]["state"] == "fail"
    health.claims = True
    assert health.report()["healthy"] is True


def test_a_worker_that_is_gone_or_hangs_does_not_live(process: subprocess.Popen[bytes]) -> None:
    """Also as a zombie."""
    health = Health(process.pid, [], claims=True)
    health.start(60)
    assert health.live() == ""
    health.hung = lambda: "its loop stands still"
    assert health.live() == "the worker hangs: its loop stands still"
    health.hung = lambda: ""
    process.kill()
    assert eventually(health.live) == "the worker process is gone"
    assert health.report()["healthy"] is False


@pytest.mark.parametrize(("drains", "number"), [(True, signal.SIGUSR2), (False, signal.SIGTERM)])
def test_a_worker_of_a_failed_device_drains_after_a_heartbeat(
    process: subprocess.Popen[bytes], drains: bool, number: int
) -> None:
    """Once; and a worker of the release before, which would die of the newer signal, gets SIGTERM."""
    gpu = Fixed("gpu", OK)
    health = Health(process.pid, [gpu], claims=True, drains=drains)
    health.start(60)
    assert health.beat() == ""
    gpu.condemned = "the driver asks for GPU_RESET"
    health.act()
    assert process.poll() is None, "no heartbeat has said it yet"
    assert health.beat() == "the driver asks for GPU_RESET"
    health.act()
    health.act()
    assert process.wait(30) == number
    health.act()
    assert health.report()["checks"]["worker"]["state"] == "fail"
