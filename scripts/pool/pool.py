"""A pool on this machine: a reaper, workers and spares as child processes.

What ``perdure up`` runs in the foreground and the demonstration kills. Workers are plain ``rq worker`` commands. What
is done is decided by :class:`perdure.workers.pool.supervisor.Supervisor`; here it is carried out, in one thread: the
kernel sends a child SIGTERM when the thread that started it ends.

Every child leads a process group of its own: Ctrl-C reaches the pool, which drains them.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ...protocol.settings import Settings
from ...workers.pool.draining import LEAVE
from ...workers.pool.gpus import Gpu
from ...workers.pool.notify import Notifier
from ...workers.pool.places import INCARNATION, Action, Ask, Examine, Kill, Phase, Place, Role, Say, Start, Tell
from ...workers.pool.supervisor import Supervisor
from .children import OutputRelay, Undertaker, ended, environment_for, launch, signal_group
from .examiner import Examiner
from .sight import Sight

log = logging.getLogger("perdure.pool")

POLL: Final = 0.1
"""Seconds between two looks at the clock, and at children on systems without process handles."""

START: Final = 60.0
"""Seconds that a worker may take beside loading its tasks: the interpreter, RQ, its guardian."""


@dataclass(frozen=True, slots=True)
class Child:
    """One place of the pool, for those who look at it."""

    place: Place
    _processes: dict[str, subprocess.Popen[bytes]]

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process that fills it now."""
        return self._processes.get(self.place.run)


@dataclass(slots=True)
class Pool:
    """Starts, watches and stops the children of one ``perdure up``.

    The server's URL goes to them through the environment, where other users cannot read it; ``output`` is
    the file that takes what they print (``None``: the terminal). With ``gpus`` there is one worker for each, and
    ``workers`` is not read; spares are spread over them in turn.
    """

    url: str
    queues: Sequence[str]
    workers: int
    settings: Settings
    output: Path | None = None
    quiet: bool = False
    named: bool = False
    """On the terminal, each line has the name of its place in front."""
    spares: int = 0
    gpus: Sequence[Gpu] = ()
    notifier: Notifier = field(default_factory=Notifier)
    release: str = "start the pool again"
    """What a person types to release quarantined places."""
    supervisor: Supervisor = field(init=False)
    _gpus: dict[str, Gpu] = field(default_factory=dict)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _mail: queue.SimpleQueue[Callable[[float], list[Action]]] = field(default_factory=queue.SimpleQueue)
    _bell: tuple[socket.socket, socket.socket] = field(init=False)
    _selector: selectors.BaseSelector = field(init=False)
    _sight: Sight = field(init=False)
    _examiner: Examiner = field(init=False)
    _undertaker: Undertaker = field(init=False)
    _relay: OutputRelay | None = None
    _thread: threading.Thread | None = None
    _up: bool = False

    def __post_init__(self) -> None:
        numbers = range(1, self.workers + 1)
        names = [gpu.name for gpu in self.gpus] or [f"worker-{number}" for number in numbers]
        self._gpus = dict(zip(names, self.gpus, strict=False))
        places = [Place("reaper", Role.REAPER)]
        places += [Place(name, device=self._device(name)) for name in names]
        for number in range(self.spares):
            if self.gpus:
                self._gpus[f"spare-{number + 1}"] = self.gpus[number % len(self.gpus)]
            name = f"spare-{number + 1}"
            places.append(Place(name, Role.SPARE, device=self._device(name)))
        settings = self.settings
        self.supervisor = Supervisor(
            places,
            load_timeout=START + settings.load_timeout * max(1, len(settings.tasks)),
            drain_timeout=settings.drain_timeout,
            name=lambda place: f"{place}-{uuid.uuid4().hex[:8]}",
            release=self.release,
        )
        supervisor = self.supervisor
        self._sight = Sight(
            self.url,
            f"{socket.gethostname()}-{os.getpid()}",
            seen=lambda standings: self._post(lambda now: supervisor.seen(now, standings)),
            judged=lambda run, held: self._post(lambda now: supervisor.judged(now, run, held)),
        )
        self._undertaker = Undertaker(settings.drain_timeout + LEAVE)
        self._examiner = Examiner(
            lambda place, action, occupied: self._post(
                lambda now: supervisor.examined(now, place, action, occupied=occupied)
            )
        )

    @property
    def children(self) -> list[Child]:
        """Every place of the pool, the reaper first."""
        return [Child(place, self._processes) for place in self.supervisor.places]

    def start(self) -> None:
        """Start all children, and a thread that looks after them."""
        self._bell, self._selector = socket.socketpair(), selectors.DefaultSelector()
        for end in self._bell:
            end.setblocking(False)
        self._selector.register(self._bell[0], selectors.EVENT_READ)
        self._sight.start()
        if self.named and self.output is None:
            self._relay = OutputRelay()
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Drain, without waiting for it; a second call does not wait for running steps, a third one kills."""
        self._post(self.supervisor.stop)

    def release_quarantined(self) -> None:
        """Try again in every place that was given up."""
        self._post(self.supervisor.released)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of a pool that was asked to stop; True once nothing of it is left."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> bool:
        """SIGTERM to all, SIGKILL to what outlives the drain; True if everybody left by himself."""
        if self._thread is not None:
            self.ask_to_stop()
            self.join()
        return self.supervisor.killed == 0

    # --- the loop --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._do(self.supervisor.start(time.monotonic()))
            while not self.supervisor.done:
                self._turn()
        except BaseException:
            log.critical("the supervisor stopped; its workers drain", exc_info=True)
            self._undertaker.abandon()
        else:
            self._undertaker.dismiss()
        finally:
            if self._relay is not None:
                self._relay.close()
            self._sight.stop()
            self._examiner.stop()
            self.notifier.status(self.supervisor.summary())
            self._selector.close()
            for end in self._bell:
                end.close()

    def _turn(self) -> None:
        for ready, _ in self._selector.select(POLL):
            if ready.fileobj is self._bell[0]:
                self._bell[0].recv(4096)
        self._bury()
        while not self._mail.empty():
            self._do(self._mail.get()(time.monotonic()))
        self._do(self.supervisor.tick(time.monotonic()))
        self._tell()

    def _post(self, event: Callable[[float], list[Action]]) -> None:
        """From any thread: let the loop take an event in."""
        self._mail.put(event)
        try:
            self._bell[1].send(b"!")
        except OSError:
            pass  # it has been rung often enough, or nobody is there any more

    def _bury(self) -> None:
        """Children that have ended: their whole group with them, then their number."""
        for run, process in list(self._processes.items()):
            if not ended(process):
                continue
            # Before the number of the group can be another's.
            signal_group(process.pid, signal.SIGKILL)
            status = process.wait()
            self._forget(process)
            del self._processes[run]
            device = self._device(run.rpartition("-")[0])
            if device is not None:
                self._examiner.ended(device, process.pid)
            self._do(self.supervisor.gone(time.monotonic(), run, status))

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Start(run, role, _):
                    self._start(run, role)
                case Tell(run, number):
                    if (process := self._processes.get(run)) is not None:
                        process.send_signal(number)
                case Kill(run):
                    if (process := self._processes.get(run)) is not None:
                        signal_group(process.pid, signal.SIGKILL)
                case Ask(run):
                    self._sight.ask(run)
                case Examine(place, device):
                    self._examiner.ask(place, device)
                case Say(level, text):
                    log.log(level, "%s", text)

    def _tell(self) -> None:
        supervisor = self.supervisor
        self.notifier.beat(time.monotonic())
        self.notifier.status(supervisor.summary())
        if supervisor.up and not self._up:
            self._up = True
            self.notifier.ready()
            log.info("%s", supervisor.summary())
        self._undertaker.tend([process.pid for process in self._processes.values()])
        self._sight.eager = any(place.phase is Phase.STARTING for place in supervisor.places)
        rows = [
            {
                "place": place.name, "role": place.role, "phase": place.phase, "device": place.device,
                "worker": place.run, "reason": place.reason if place.phase is Phase.QUARANTINED else "",
            }
            for place in supervisor.places
        ]  # fmt: skip
        self._sight.show({"host": socket.gethostname(), "pid": os.getpid(), "release": self.release, "places": rows})

    # --- processes -------------------------------------------------------------------------------------

    def _start(self, run: str, role: Role) -> None:
        settings, more = self.settings, {}
        if role is Role.REAPER:
            command = [sys.executable, "-P", "-m", "perdure.recovery"]
        else:
            level = ["--quiet"] if self.quiet else []
            rq = [sys.executable, "-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--name", run]
            command = [*rq, *level, *self.queues]
            incarnation = uuid.uuid4().hex
            more[INCARNATION] = incarnation
            settings = settings.replace(spare=role is Role.SPARE)
            gpu = self._gpus.get(run.rpartition("-")[0])
            if gpu is not None:
                settings = settings.replace(device="cuda")
                more |= gpu.environment()
            self._sight.watch(run, incarnation)
        try:
            output = self.output if self._relay is None else self._relay.pipes(run.rpartition("-")[0])
            process = launch(command, environment_for(self.url, settings) | more, output)
        except OSError as error:
            # No memory, no more processes: as if it had ended at once, so that the pause grows.
            log.error("cannot start %s: %s", run, error)
            self._post(lambda now: self.supervisor.gone(now, run, 127))
            return
        self._processes[run] = process
        self._watch(process)
        self._undertaker.born(process.pid)
        log.info("%s started (pid %d)", run, process.pid)

    def _device(self, place: str) -> int | None:
        gpu = self._gpus.get(place)
        return None if gpu is None else gpu.index

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        try:
            handle = os.pidfd_open(process.pid)
        except (AttributeError, OSError):
            return  # looked at in every turn
        self._selector.register(handle, selectors.EVENT_READ, process.pid)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        self._undertaker.buried(process.pid)
        for registered in list(self._selector.get_map().values()):
            if registered.data == process.pid:
                self._selector.unregister(registered.fileobj)
                os.close(registered.fd)
