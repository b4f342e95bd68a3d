"""Stop signals: the worker's are seen at once, a forked child's are its own."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import multiprocessing, os, signal, threading
from perdure.workers.signals import SignalWatcher

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


def test_a_forked_child_gets_its_own_stop_signal() -> None:
    """A task's child (a data loader's, say) ends by SIGTERM; its parent does not notice, and still sees its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["child -15 seen []", "parent [15]"], done.stderr
