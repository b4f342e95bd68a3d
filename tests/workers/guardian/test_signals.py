"""Stop signals: the worker's are seen at once, a forked child's are its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.kit.lab import Lab

PROGRAM = """
import multiprocessing, os, signal, threading
from perdure.workers.rq.signals import SignalWatcher

seen, heard = [], threading.Event()

def note(number):
    seen.append(number)
    heard.set()

def child(ready):
    ready.set()
    signal.pause()  # ends only if the signal takes its default course
    os._exit(7)

watcher = SignalWatcher(note)
watcher.install()
context = multiprocessing.get_context("fork")
ready = context.Event()
process = context.Process(target=child, args=(ready,))
process.start()
ready.wait()
process.terminate()
process.join(10)
print("child", process.exitcode, "seen", seen)
os.kill(os.getpid(), signal.SIGTERM)
heard.wait(10)
print("parent", seen)
watcher.remove()
"""


HANDLERS = """
import asyncio, os, signal, threading, time
from perdure.workers.rq.signals import SignalWatcher

seen, heard = [], threading.Semaphore(0)

def note(number):
    seen.append(number)
    heard.release()

watcher = SignalWatcher(note)
watcher.install()

def loop_with_handlers(*numbers):
    async def run():
        loop = asyncio.get_running_loop()
        for number in numbers:
            loop.add_signal_handler(number, lambda: None)
        during(signal.SIGTERM)
        await asyncio.sleep(0)
        for number in numbers:
            loop.remove_signal_handler(number)
    asyncio.run(run())

def during(number):
    os.kill(os.getpid(), number)
    assert heard.acquire(timeout=10), "not seen while the step ran"

def own(handler):
    signal.signal(signal.SIGTERM, handler)
    during(signal.SIGTERM)

def closed():
    os.closerange(3, 64)

called = []
STEPS = [
    lambda: loop_with_handlers(signal.SIGUSR2),
    lambda: loop_with_handlers(signal.SIGTERM, signal.SIGINT),
    lambda: own(signal.SIG_IGN),
    lambda: own(signal.SIG_DFL),
    lambda: own(lambda *_: called.append("theirs")),
    lambda: signal.set_wakeup_fd(-1),
    closed,
]
for step in STEPS:
    step()
    watcher.renew()
    before = len(seen)
    time.sleep(0.15)  # a stop within a moment of another one is its echo
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.acquire(timeout=10), "not seen after the step"
    # A signal that both paths report is one signal: a second one would be a cold stop.
    time.sleep(0.05)
    assert len(seen) == before + 1, seen
    while heard.acquire(blocking=False):
        pass
print("seen", len(seen), called)
watcher.remove()
print(signal.signal.__module__)
"""


def test_no_task_takes_the_stop_signal_away() -> None:
    """Event loops, handlers of its own, SIG_IGN, the wake-up descriptor, closed descriptors: seen
    during it and after.
    """
    done = subprocess.run([sys.executable, "-c", HANDLERS], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["seen 12 ['theirs']", "signal"], done.stderr


@pytest.mark.slow
def test_a_worker_stops_after_a_task_s_event_loop(lab: Lab) -> None:
    """As uvicorn, aiohttp and grpc.aio do: handlers are added and removed again."""
    worker = lab.worker()
    assert lab.ended(lab.submit("signal_tasks.event_loop")).status == "finished"
    worker.send(signal.SIGTERM)
    assert worker.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ignored", "default", "wakeup"])
def test_a_worker_stops_in_a_step_that_changed_signals(lab: Lab, how: str) -> None:
    """The step ends, its request goes on elsewhere from there; nothing is charged."""
    worker = lab.worker()
    one = lab.submit("signal_tasks.changes", {"how": how})
    lab.moved(one, 2)
    worker.send(signal.SIGTERM)
    assert worker.end() == 0
    assert {event for event, _ in lab.events(one)} == {"released"}


def test_a_forked_child_gets_its_own_stop_signal() -> None:
    """A task's child (a data loader's, say) ends by SIGTERM; its parent does not notice, and still sees its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["child -15 seen []", "parent [15]"], done.stderr
