"""The worker's side of its guardian, which two threads of the worker use at the same time; and what a
guardian loads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import redis

from perdure.protocol.keys import key
from perdure.protocol.settings import Settings
from perdure.workers.guardian.companion import Companion
from tests.kit.deploy.deployment import free_port
from tests.kit.lab import Lab, eventually, gone
from tests.kit.places import TASKS

# Run by every process before anything else: a guardian notes at its end what it has loaded since.
NOTES = """
import atexit, pathlib, sys

before = set(sys.modules)
if "perdure.workers.guardian.process" in sys.orig_argv:
    atexit.register(lambda: pathlib.Path("loaded").write_text("\\n".join(set(sys.modules) - before)))
"""


def test_news_for_a_dismissed_guardian_reaches_the_next(connection: redis.Redis) -> None:
    """The courier's thread closes the pipe (the worker was declared dead) while the main thread says "ready"."""
    companion = Companion(connection, Settings(), "w", ["gpu"])
    companion.watch("one")
    try:
        process = companion._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.close()  # where dismiss() stands when it waits for the guardian's end
        companion.tell(ready=True)
        companion.watch("two")
        assert companion.ready, "told to the next guardian with its first line"
    finally:
        companion.dismiss()


# What a guardian may load besides the standard library and us, with what these load themselves.
PACKAGES = "import msgpack, redis, sys, sysconfig; sysconfig.get_config_vars(); print(*sys.modules)"


def test_a_guardian_loads_the_standard_library_redis_and_us(lab: Lab, tmp_path: Path) -> None:
    """Neither rq nor torch, from its start to the handing on of what its killed worker held. It sweeps, too."""
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    path = os.pathsep.join((str(tmp_path), str(TASKS)))
    worker = lab.worker(environment={"PYTHONPATH": path}, health_port=free_port())
    (guardian,) = worker.children()
    eventually(lambda: lab.connection.exists(key("pulse")))  # it has swept
    identifier = lab.submit("count", {"n": 1000, "sleep": 0.01})
    lab.moved(identifier)
    worker.kill()
    eventually(lambda: gone(guardian))
    assert lab.events(identifier) == [("redelivered", "WORKER_LOST")], "the guardian has reaped"
    loaded = (tmp_path / "loaded").read_text().split()
    assert "perdure.recovery.reaper" in loaded
    allowed = subprocess.run(
        [sys.executable, "-c", PACKAGES], check=True, capture_output=True, text=True
    ).stdout.split()
    top = {name.partition(".")[0] for name in loaded}
    assert sorted(top - {name.partition(".")[0] for name in allowed} - sys.stdlib_module_names) == ["perdure"]
    assert not [name for name in loaded if name.startswith(("perdure.producer", "perdure.scripts"))]
