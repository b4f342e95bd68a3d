"""What kind of failure an error is, and what follows."""

from __future__ import annotations

import errno
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
from typing import Any

import pytest
import redis

from perdure.protocol.errors import InvalidRequest, PayloadTooLarge, RedisUnavailable, SettingsError
from perdure.protocol.records import FailureKind
from perdure.recovery.failures import MAX_REASON, MAX_TRACEBACK, POLICIES, classify, describe, failure


def raised(error: BaseException, *, cause: BaseException | None = None, context: BaseException | None = None) -> Any:
    """The error as if it had been raised from, or while handling, another one."""
    error.__cause__ = cause
    error.__context__ = context or cause
    return error


TYPES = [
    (ValueError("wrong"), FailureKind.ERROR),
    (RuntimeError(), FailureKind.ERROR),
    (KeyboardInterrupt(), FailureKind.ERROR),
    (MemoryError(), FailureKind.HOST_OOM),
    (OSError(errno.ENOMEM, "no memory"), FailureKind.HOST_OOM),
    (OSError(errno.ENOSPC, "no space"), FailureKind.ERROR),
    (FileNotFoundError(errno.ENOENT, "no file"), FailureKind.ERROR),
    (ConnectionRefusedError(), FailureKind.NETWORK),
    (ConnectionResetError(), FailureKind.NETWORK),
    (BrokenPipeError(), FailureKind.NETWORK),
    (TimeoutError(), FailureKind.NETWORK),
    (OSError(errno.EHOSTUNREACH, "no route"), FailureKind.NETWORK),
    (socket.gaierror(-2, "name unknown"), FailureKind.NETWORK),
    (ssl.SSLError(1, "handshake"), FailureKind.NETWORK),
    (redis.ConnectionError("gone"), FailureKind.NETWORK),
    (redis.TimeoutError("late"), FailureKind.NETWORK),
    (redis.BusyLoadingError("loading"), FailureKind.NETWORK),
    (redis.ResponseError("WRONGTYPE"), FailureKind.ERROR),
    (RedisUnavailable("gone"), FailureKind.NETWORK),
    (InvalidRequest("max_tokens is 0", "max_tokens"), FailureKind.INVALID_REQUEST),
    (PayloadTooLarge("an output has 9 MiB"), FailureKind.INVALID_REQUEST),
    (SettingsError("PERDURE_DEVICE"), FailureKind.ERROR),
]


@pytest.mark.parametrize(("error", "kind"), TYPES, ids=lambda value: type(value).__name__ if value else "")
def test_the_type_says_the_kind(error, kind):
    """By type and errno."""
    assert classify(error) is kind


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory",
        "NCCL timeout",
        "connection refused",
        "Killed: OOM",
        "device-side assert",
        "HANG",
        "invalid",
    ],
)
def test_no_text_says_anything(text):
    """The text may be the user's prompt: it must not decide what becomes of the pool."""
    for error in (RuntimeError(text), ValueError(text), OSError(text), Exception(text, text)):
        assert classify(error) is FailureKind.ERROR


def test_the_cause_is_looked_at():
    """Libraries wrap what happened; what it was stands behind `from`."""
    assert classify(raised(RuntimeError("step failed"), cause=ConnectionRefusedError())) is FailureKind.NETWORK
    assert classify(raised(ValueError(), cause=raised(KeyError(), cause=MemoryError()))) is FailureKind.HOST_OOM


def test_the_context_is_looked_at():
    """Urllib and many others raise while handling the real error."""
    error = raised(urllib.error.URLError("refused"), context=ConnectionRefusedError())
    assert classify(error) is FailureKind.NETWORK
    assert classify(raised(ValueError(), context=raised(KeyError(), context=TimeoutError()))) is FailureKind.NETWORK


def test_the_outermost_error_that_says_something_decides():
    """Who raised InvalidRequest because of a missing file meant InvalidRequest."""
    assert classify(raised(InvalidRequest("x"), cause=ConnectionResetError())) is FailureKind.INVALID_REQUEST
    assert classify(raised(TimeoutError(), context=InvalidRequest("x"))) is FailureKind.NETWORK


def test_an_invalid_request_needs_intent():
    """An error that merely happened while one was handled is retried: refusing for ever is the graver mistake."""
    assert classify(raised(RuntimeError(), context=InvalidRequest("x"))) is FailureKind.ERROR
    assert classify(raised(RuntimeError(), cause=InvalidRequest("x"))) is FailureKind.INVALID_REQUEST


def test_the_members_of_a_group_are_looked_at():
    """A task group wraps what its tasks raised."""
    assert classify(ExceptionGroup("two", [KeyError("x"), ConnectionResetError()])) is FailureKind.NETWORK
    assert classify(BaseExceptionGroup("one", [KeyboardInterrupt()])) is FailureKind.ERROR


def test_a_circular_chain_ends():
    """Chains can be made circular by hand."""
    first, second = ValueError(), KeyError()
    first.__context__, second.__context__ = second, first
    first.__cause__ = first
    assert classify(first) is FailureKind.ERROR


class TestWithTorch:
    """The kinds that torch's errors are."""

    torch: Any = pytest.importorskip("torch", reason="needs torch, as its errors do")

    def test_out_of_memory_on_the_device(self):
        """The step was too large for what was free; the process is well."""
        assert classify(self.torch.OutOfMemoryError("x")) is FailureKind.GPU_OOM

    def test_an_accelerator_error_is_a_device_error(self):
        """Unless its code says that only memory was lacking."""
        error = self.torch.AcceleratorError("x")
        assert classify(error) is FailureKind.GPU_ERROR
        error.error_code = 2
        assert classify(error) is FailureKind.GPU_OOM
        error.error_code = 710
        assert classify(error) is FailureKind.GPU_ERROR

    def test_a_device_error_decides_wherever_it_stands(self):
        """The process is unfit, whoever wrapped it in whatever, even `from None`."""
        error = raised(InvalidRequest("token out of range"), context=self.torch.AcceleratorError("assert"))
        error.__suppress_context__ = True
        assert classify(error) is FailureKind.GPU_ERROR
        assert classify(raised(TimeoutError(), cause=self.torch.AcceleratorError("x"))) is FailureKind.GPU_ERROR

    def test_collectives_are_network(self):
        """A peer or the way to it failed."""
        import torch.distributed as distributed

        for name in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError"):
            assert classify(getattr(distributed, name)("NCCL error: unhandled cuda error")) is FailureKind.NETWORK


def test_torch_is_never_imported_for_it():
    """The guardian and a producer's process classify without torch; a class of the same name is not torch's."""
    code = """
import sys
from perdure.recovery.failures import classify
class OutOfMemoryError(RuntimeError): pass
assert classify(OutOfMemoryError("CUDA out of memory")) == "ERROR"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_kind_has_a_policy():
    """A new kind of failure needs a decision."""
    assert set(POLICIES) == set(FailureKind)


def test_a_request_is_not_charged_for_its_worker():
    """Attempts are for what the task itself did; crashes and losses are counted by themselves."""
    for policy in POLICIES.values():
        assert not (policy.charge and (policy.crash or policy.loss))
    assert {kind for kind, policy in POLICIES.items() if not policy.retry} == {"INVALID_REQUEST", "DEADLINE"}
    assert {kind for kind, policy in POLICIES.items() if policy.crash} == {"GPU_ERROR", "HANG", "HOST_OOM", "CRASH"}
    assert {kind for kind, policy in POLICIES.items() if policy.worker == "exit"} == {
        "GPU_ERROR",
        "WORKER_LOST",
        "HANG",
        "HOST_OOM",
        "CRASH",
    }


def test_the_table_cannot_be_changed_by_accident():
    """One table for the whole process."""
    with pytest.raises(TypeError):
        POLICIES[FailureKind.CRASH] = POLICIES[FailureKind.ERROR]  # type: ignore[index]


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("wrong"), "ValueError: wrong"),
        (ValueError(), "ValueError"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (ValueError("\n\n  third \n"), "ValueError: third"),
        (ValueError("red \x1b[31m and \ud800"), "ValueError: red  [31m and  "),
        (redis.ConnectionError("gone"), "redis.exceptions.ConnectionError: gone"),
    ],
)
def test_a_description_is_one_plain_line(error, text):
    """Type and first line: no terminal escapes from a user's text, nothing that UTF-8 cannot hold."""
    assert describe(error) == text
    assert describe(error).encode().decode().isprintable()


def test_a_description_is_bounded():
    """A prompt in a message does not fill the history."""
    assert len(describe(ValueError("x" * 10_000))) == MAX_REASON
    assert describe(Unspeakable()).endswith("Unspeakable: (its message cannot be shown)")


def test_a_failure_carries_the_policy_of_its_kind():
    """The record that `fail` stores."""
    try:
        raise ConnectionResetError("reset")
    except ConnectionResetError as error:
        record = failure("a", "e1", error)
    assert (record.id, record.execution, record.kind) == ("a", "e1", FailureKind.NETWORK)
    assert record.reason == "ConnectionResetError: reset"
    assert "tests/recovery/test_failures.py" in record.traceback
    assert (record.charge, record.crash, record.loss, record.retry) == (True, False, False, True)


def test_a_long_traceback_loses_its_middle():
    """Where it began and what it was are kept."""
    record = failure("a", "e1", ValueError("begin " + "x" * 100_000 + " end"))
    assert len(record.traceback) < MAX_TRACEBACK + 100
    assert "begin" in record.traceback
    assert record.traceback.rstrip().endswith("end")
    assert "left out" in record.traceback
    assert "Unspeakable" in failure("a", "e1", Unspeakable()).traceback


def test_a_message_of_many_megabytes_costs_no_step_timeout() -> None:
    """It took 10 s and more: its worker was ended as one that hangs, and its batch with it."""
    error = ValueError("\n " + "x" * 20_000_000)
    began = time.monotonic()
    assert describe(error).startswith("ValueError: xxx")
    assert time.monotonic() - began < 1.0
    assert len(failure("a", "e", error).reason) == MAX_REASON
