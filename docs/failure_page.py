"""The page docs/reference/failures.md: each kind of failure, what is taken for it, and what follows.

Nothing is written down twice: the examples are judged by the code that judges them in a worker, and what follows is
read from its policies.
"""

from __future__ import annotations

import errno
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from perdure.protocol.errors import InvalidRequest, PayloadTooLarge
from perdure.protocol.records import FailureKind
from perdure.recovery.deaths import Death
from perdure.recovery.failures import POLICIES, classify

TITLE = "Failures: what is taken for what, and what follows"

INTRODUCTION = """\
An error is judged by its type, its `__cause__` and its `errno`, the end of a process by who stood still in it, by what
faulthandler wrote, by its exit status or signal, by what the kernel counted in its cgroup, and by NVML's recovery
action for its device. No text that a user could have written is ever looked at. Tasks choose by what they raise.
"""

COLUMNS = """\
- *attempt*: it counts as one; when `max_retries` further ones are used up, the request is a dead letter.
- *crash*: it counts as one; `PERDURE_MAX_CRASHES` alone on a worker, or `PERDURE_MAX_CRASHES_TOTAL`, make a dead
  letter.
- *suspect*: whether what was in flight runs in limited company from then on.
- *next execution*: after what delay; the first redelivery after the loss of a worker is immediate.
- *the worker*: what its process does. One that exits is to be replaced. Only a worker that is a group of processes
  leaves it, and only when a collective failed; any other goes on.
"""

DEATHS = (
    (
        "a native signal (SIGSEGV, SIGABRT …), seen by faulthandler",
        Death(dump="Fatal Python error: Aborted\n\nThread 0x1"),
    ),
    ("the same, seen by its parent", Death(status=-11)),
    ("SIGKILL, and the cgroup's `oom_kill` has risen", Death(status=-9, oom_kills=1)),
    ("gone without a word, and `oom_kill` has risen", Death(oom_kills=1)),
    ("SIGKILL", Death(status=-9)),
    ("gone without a word: kill -9, power, host", Death()),
    ("the engine loop or the courier stood still", Death(hung="its engine loop")),
    ("ended by its own watchdog", Death(dump="Timeout (0:00:45)!\nThread 0x1")),
    ("exit status 70", Death(status=70)),
    ("exit status 71", Death(status=71)),
    ("exit status 73", Death(status=73)),
    ("any other exit status", Death(status=1)),
    (
        "a signal or a hang, and NVML wants its device reset, drained or its node rebooted",
        Death(status=-6, action="GPU_RESET"),
    ),
)
"""Ends of a worker's process."""

ELSEWHERE = {
    FailureKind.MODEL_MISMATCH: "the worker has another model than the checkpoint's, and hands it back",
    FailureKind.DEADLINE: "its deadline passed, waiting or running",
    FailureKind.UNKNOWN: "handed back `PERDURE_MAX_EXECUTIONS` times without progress; in 0.1.0, any `ERROR`",
}
"""Kinds that no error and no end of a process has: a script or a worker says them."""


def errors() -> Iterator[tuple[str, BaseException]]:
    """Errors, and how they are written. Torch's are looked up where torch is imported: here, stand-ins are."""
    torch, distributed = sys.modules["torch"], sys.modules["torch.distributed"]
    full = torch.AcceleratorError("x")
    full.error_code = 2
    yield "`torch.OutOfMemoryError`", torch.OutOfMemoryError("x")
    yield "`torch.AcceleratorError` with the code of a full device (2)", full
    yield "any other `torch.AcceleratorError`, wrapped in whatever", _from(ValueError("x"), torch.AcceleratorError("x"))
    yield "`torch.distributed.DistError`", distributed.DistError("x")
    yield "`ConnectionError`, `TimeoutError`", TimeoutError("x")
    yield "`socket.gaierror`, `ssl.SSLError`", __import__("ssl").SSLError("x")
    yield "`OSError` with `EHOSTUNREACH`, `ENETDOWN` and the like", OSError(errno.EHOSTUNREACH, "x")
    yield "`redis.ConnectionError`, `redis.TimeoutError`", redis.ConnectionError("x")
    yield "`MemoryError`, `OSError` with `ENOMEM`", MemoryError()
    yield (
        "`InvalidRequest`, `PayloadTooLarge`, or an error raised `from` one",
        _from(ValueError("x"), InvalidRequest("x")),
    )
    yield "an output or state that is too large", PayloadTooLarge("x")
    yield (
        "an error raised `from` one of these: as the one it was raised from",
        _from(RuntimeError("x"), ConnectionResetError()),
    )
    yield "any other error, whatever its text", RuntimeError("CUDA error: out of memory, timeout")


def failure_page() -> str:
    """The page as Markdown."""
    with _torch():
        examples = [(text, classify(error)) for text, error in errors()]
    examples += [(text, death.kind) for text, death in DEATHS]
    rows = []
    for kind in FailureKind:
        policy = POLICIES[kind]
        yes = [("yes" if value else "–") for value in (policy.charge, policy.crash)]
        rows.append(f"| `{kind}` | {yes[0]} | {yes[1]} | {policy.suspect} | {policy.delay} | {policy.worker} |")
    parts = [
        f"# {TITLE}\n", INTRODUCTION,
        "## What follows\n", "`from perdure.recovery import POLICIES`\n", COLUMNS,
        "| kind | attempt | crash | suspect | next execution | the worker |\n|---|---|---|---|---|---|",
        "\n".join(rows) + "\n",
        "## What is taken for what\n", "`from perdure.recovery import classify, Death`\n",
    ]  # fmt: skip
    lines = []
    for kind in FailureKind:
        found = [text for text, of in examples if of is kind] or [ELSEWHERE[kind]]
        lines += [f"| `{kind}` | {text} |" for text in found]
    parts.append("| kind | |\n|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@contextmanager
def _torch() -> Iterator[None]:
    """Torch's error types by name, so that the page is the same with and without torch."""
    names = {"torch": ("OutOfMemoryError", "AcceleratorError"), "torch.distributed": ("DistError",)}
    before = {name: sys.modules.get(name) for name in names}
    for name, kinds in names.items():
        stand_in = types.ModuleType(name)
        for kind in kinds:
            setattr(stand_in, kind, type(kind, (RuntimeError,), {}))
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
