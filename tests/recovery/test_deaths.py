"""What the end of a process is, from the evidence that there is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.protocol.records import FailureKind
from perdure.recovery.cgroups import OomKills, find
from perdure.recovery.deaths import Death, device_kind
from perdure.recovery.failures import MAX_TRACEBACK, POLICIES, classify, failure

CRASHED = 'Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n  File "x.py"'
ENDED_ITSELF = 'Timeout (0:00:45)!\nThread 0x1 (most recent call first):\n  File "x.py"'

ENDS = [
    (Death(), "WORKER_LOST", "is gone"),
    (Death(status=0), "WORKER_LOST", "is gone"),
    (Death(status=1), "WORKER_LOST", "exited with status 1"),
    (Death(status=-9), "WORKER_LOST", "was ended by SIGKILL"),
    (Death(status=137), "WORKER_LOST", "was ended by SIGKILL"),
    (Death(status=-15), "WORKER_LOST", "was ended by SIGTERM"),
    (Death(status=-9, oom_kills=1), "HOST_OOM", "killed by the kernel"),
    (Death(oom_kills=1), "HOST_OOM", "killed by the kernel"),
    (Death(status=1, oom_kills=1), "WORKER_LOST", "exited with status 1"),
    (Death(status=-11, oom_kills=1), "CRASH", "was ended by SIGSEGV"),
    (Death(status=-6), "CRASH", "was ended by SIGABRT"),
    (Death(status=134), "CRASH", "was ended by SIGABRT"),
    (Death(status=-62), "WORKER_LOST", "was ended by signal 62"),
    (Death(dump=CRASHED), "CRASH", "crashed: Segmentation fault"),
    (Death(dump='{"fingerpr' + CRASHED, oom_kills=1), "CRASH", "crashed: Segmentation fault"),
    (Death(dump=ENDED_ITSELF), "HANG", "hung, and ended itself"),
    (Death(dump=ENDED_ITSELF, stopped=True), "WORKER_LOST", "is gone"),
    (Death(hung="its courier has not moved", dump=CRASHED, status=-6), "HANG", "hung: its courier has not moved"),
    (Death(hung="its courier has not moved", status=-9, oom_kills=1), "HANG", "hung: its courier"),
    (Death(status=70), "GPU_ERROR", "exited with status 70"),
    (Death(status=71), "GPU_OOM", "exited with status 71"),
    (Death(status=72), "WORKER_LOST", "exited with status 72"),
    (Death(status=73), "HANG", "hung"),
    (Death(hung="its engine loop", action="GPU_RESET"), "GPU_ERROR", "its device wants GPU_RESET"),
    (Death(dump=CRASHED, action="NODE_REBOOT"), "GPU_ERROR", "its device wants NODE_REBOOT"),
    (Death(oom_kills=1, action="GPU_RESET"), "HOST_OOM", "killed by the kernel"),
    (Death(status=-9, action="NONE"), "WORKER_LOST", "was ended by SIGKILL"),
]


@pytest.mark.parametrize(("death", "kind", "reason"), ENDS, ids=lambda value: str(value)[:40])
def test_the_end_of_a_process_says_its_kind(death: Death, kind: str, reason: str) -> None:
    """Who stood still, faulthandler, status or signal, the kernel's count, the device."""
    assert death.kind == kind
    assert reason in death.reason


def test_the_stacks_are_what_faulthandler_wrote() -> None:
    """Without its first line, and bounded."""
    assert Death(dump=CRASHED).stacks.startswith("Current thread")
    assert Death(dump=ENDED_ITSELF).stacks.startswith("Thread 0x1")
    assert Death(dump="half a mess").stacks == ""
    assert len(Death(dump=CRASHED + "x" * 10**6).stacks) < MAX_TRACEBACK + 100


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import os; os.abort()", "CRASH"),
        ("import ctypes; ctypes.string_at(0)", "CRASH"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "WORKER_LOST"),
        ("raise SystemExit(70)", "GPU_ERROR"),
    ],
)
def test_real_ends(code: str, kind: str) -> None:
    """As `subprocess` reports them."""
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True)
    assert Death(status=ended.returncode).kind == kind


@pytest.mark.parametrize(
    ("action", "kind"),
    [("NONE", None), ("UNKNOWN", None), ("", None), *((name, "GPU_ERROR") for name in (
        "GPU_RESET", "NODE_REBOOT", "DRAIN_P2P", "DRAIN_AND_RESET"))],
)  # fmt: skip
def test_a_device_that_wants_a_reset_is_the_cause(action: str, kind: str | None) -> None:
    """NVML's recovery action, by name; what is not known accuses nobody."""
    assert device_kind(action) == kind


STEERING = ("CUDA error: device-side assert", "timeout", "NCCL", "out of memory", "connection refused", "Killed",
            "SIGKILL",
            "Fatal Python error: Aborted", "oom_kill 7", "HANG", "GPU_RESET")  # fmt: skip


class Odd(Exception):
    pass


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.one_of(st.sampled_from(STEERING), st.text(max_size=20)), max_size=5).map(" ".join),
    kind=st.sampled_from([ValueError, RuntimeError, Exception, OSError, KeyError, AssertionError, Odd]),
    depth=st.integers(0, 3),
)
def test_no_prompt_steers_the_classification(prompt: str, kind: type[Exception], depth: int) -> None:
    """Whatever a user wrote stands in an error's text, its arguments, its notes or its cause's: it says nothing."""
    error: BaseException = kind(prompt)
    error.add_note(prompt)
    for _ in range(depth):
        outer = kind(prompt, prompt)
        outer.__cause__ = outer.__context__ = error
        error = outer
    assert classify(error) is FailureKind.ERROR
    record = failure("a", "e", error)
    assert (record.charge, record.crash, record.loss) == (True, False, False)
    assert POLICIES[record.kind].worker == "go on"


ROW = [
    # What the usual substring matching takes for something else, and what it is.
    (MemoryError(), "HOST_OOM"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "ERROR"),
    (OSError(28, "No space left on device"), "ERROR"),
    (ValueError("summarize: 'a timeout of the network'"), "ERROR"),
    (ConnectionRefusedError(111, "Connection refused"), "NETWORK"),
    (ConnectionResetError(104, "Connection reset by peer"), "NETWORK"),
    (OSError(110, "anything"), "NETWORK"),
    (KeyError("CUDA"), "ERROR"),
]


@pytest.mark.parametrize(("error", "kind"), ROW, ids=lambda value: repr(value)[:50])
def test_what_substrings_get_wrong(error: BaseException, kind: str) -> None:
    """By type and errno, whatever the words."""
    assert classify(error) == kind


def _cgroup(root: Path, pid: int, line: str, file: str, text: str) -> Path:
    (root / f"proc/{pid}").mkdir(parents=True)
    (root / f"proc/{pid}/cgroup").write_text(line)
    path = root / "sys/fs/cgroup" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/system.slice/x.service\n", "system.slice/x.service/memory.events"),
        ("0::/\n", "memory.events"),
        ("0::/../the/hosts/path\n", "memory.events"),
        ("9:memory:/docker/abc\n0::/\n", "memory/docker/abc/memory.oom_control"),
        ("9:memory:/docker/abc\n", "memory/memory.oom_control"),
        ("0::/\n4:cpu,memory:/a\n", "memory/a/memory.oom_control"),
    ],
)
def test_the_count_of_the_cgroup_is_found(tmp_path: Path, line: str, file: str) -> None:
    """Version 2, and 1; by the path, or at the top of what a container sees."""
    path = _cgroup(tmp_path, 7, line, file, "oom 3\noom_kill 2\n")
    kills = OomKills.of(7, root=tmp_path)
    assert kills.look() == 0, "what was killed before says nothing"
    path.write_text("oom 3\noom_kill 4\noom_group_kill 0\n")
    assert (kills.look(), kills.look()) == (2, 0)
    path.unlink()
    assert kills.look() == 0


def test_nothing_is_counted_where_nothing_is(tmp_path: Path) -> None:
    """Another system, a kernel without the controller, a file that says something else."""
    assert OomKills.of(7, root=tmp_path).look() == 0
    _cgroup(tmp_path, 8, "garbage\n\n0::/a\n", "a/memory.events", "low 0\noom_kill many\n")
    assert find(8, tmp_path) is None


def test_this_machine_can_be_read() -> None:
    """Whatever it has: no error, and nobody was killed since a moment ago."""
    assert OomKills.of(os.getpid()).look() == 0


def test_signals_that_end_a_process_are_known() -> None:
    """Each has a reason of its own."""
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        assert Death(status=-number).kind == "CRASH"


def test_exit_statuses_are_those_that_workers_leave_with():
    """They stand twice, since recovery imports nothing of the workers."""
    from perdure.recovery import deaths
    from perdure.workers.pool import statuses

    assert set(deaths._EXITS) == {statuses.UNFIT_DEVICE, statuses.OUT_OF_MEMORY, statuses.HUNG}
