"""The worker: RQ's worker class for requests, started by plain ``rq worker -w perdure.workers.Worker QUEUE``.

1. ``work`` registers with RQ, starts the guardian and the courier, and runs the engine loop in the main thread.
2. The courier claims requests; the loop steps them; the guardian says that the process lives.
3. A first SIGTERM or SIGINT drains: no more claims, the running step ends, everything is stored and handed back.
   A second one, a second or more later, does not wait for the step. So does the guardian's signal that the device
   is not to be used; the exit status then is 70.
4. A plain RQ job that comes along runs alone, by RQ's own code.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from typing import Any, NoReturn

import redis
import rq
from rq import worker_registration
from rq.executions import Execution
from rq.job import Job
from rq.worker import DequeueStrategy, WorkerStatus

from ...protocol.connection import keep_alive
from ...protocol.keys import served
from ...protocol.records import FailureKind
from ...protocol.telemetry import logs
from ...protocol.telemetry.log_writer import flush, unblock
from ...protocol.transport.patience import be_patient
from ..engine.fitness import status_after
from ..engine.loop import EngineLoop
from ..engine.unable import Unable
from ..guardian.companion import Companion
from ..guardian.leaving import Leaving
from ..guardian.watchdog import Watchdog
from ..health.state import UNFIT_SIGNAL
from ..leases.holdings import Holdings
from ..leases.mailbox import Mailbox
from ..pool.places import INCARNATION
from ..pool.statuses import UNFIT_DEVICE
from ..redis_io.claimer import Claimer, Limits
from ..redis_io.courier import Courier
from ..redis_io.line import Line
from ..tasks.base import RAISED
from ..tasks.forks import at_home
from . import arrival
from .attendants import Attendants, schedule
from .commands import CommandedWorker
from .dependents import Dependents
from .foreign import foreign, stock_worker
from .plain_jobs import PlainJobs
from .signals import SignalWatcher

COLD_AFTER = 1.0
"""Seconds after the first stop signal in which another one is its echo (Ctrl-C reaches a whole process group)."""


class Worker(CommandedWorker):
    """RQ's worker class for requests; ``rq worker -w perdure.workers.Worker QUEUE`` makes and runs one.

    It runs requests in batches under leases, and plain RQ jobs one at a time. Arguments are those of RQ's ``Worker``;
    settings come from the environment.
    """

    def __init__(self, queues: Any, *args: Any, **kwargs: Any) -> None:
        # RQ makes instances only to look at them too (Worker.all, rq info): nothing is started here.
        super().__init__(queues, *args, **kwargs)
        self._loop: EngineLoop | None = None
        self._beside: Attendants | None = None
        self._leaving: Leaving | None = None
        self._signals: list[float] = []

    # --- RQ's entry ----------------------------------------------------------------------------------

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = "%H:%M:%S",
        log_format: str = "%(asctime)s %(message)s",
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Work until told to stop; True if any request or job was claimed.

        Arguments are RQ's. Exits the process with status 1 when it cannot begin (a model that does not load, an
        untested RQ), and with one of :mod:`..pool.statuses` when it has become unfit, after a message that says why.
        """
        if why := foreign(self):
            self.log.warning("Worker %s: %s: RQ's own worker serves its queues, and no requests", self.name, why)
            return stock_worker(self).work(
                burst, logging_level, date_format, log_format, max_jobs, max_idle_time, with_scheduler, dequeue_strategy
            )
        settings, store, findings = arrival.begin(self.connection, (queue.name for queue in self.queues))
        keep_alive(self.connection)
        be_patient(self.connection)
        logs.take_over(settings.log_format, worker=self.name, device=settings.device)
        self.bootstrap(logging_level, date_format, log_format)
        self.log.info("Worker %s: Perdure %s; the version above is RQ's", self.name, arrival.release())
        # From here on: a reader of this process' output who stops must stop nothing else.
        restore_logs = unblock()
        for finding in findings:
            self.log.warning("Worker %s: %s", self.name, finding)
        self.connection.expire(self.key, 60)  # the guardian renews it; a killed worker's name is free again soon
        self._dequeue_strategy = dequeue_strategy
        scheduler = schedule(self, burst=burst, logging_level=logging_level) if with_scheduler else None
        self._beside = beside = Attendants.of(self, settings, scheduler)
        beside.blocked.append(restore_logs)
        companion = beside.companion
        holdings = Holdings(settings, Mailbox())
        limits = Limits(burst, max_jobs, max_idle_time)
        claimer = Claimer(store, holdings, self.name, self._next_queues, limits, settings.resume, self.log)
        page = companion.page
        line = Line(store, self.name, holdings, self.log, os.environ.pop(INCARNATION, "") or uuid.uuid4().hex)
        courier = Courier(
            line,
            claimer,
            tended=beside.tend,
            rejoined=self._rejoined,
            counter=page.courier,
            patience=arrival.patience(settings),
        )
        loop = EngineLoop(
            holdings,
            settings,
            PlainJobs(self, courier).run,
            beside.loaded,
            Watchdog(page.loop, companion.crash_file),
            companion.give_up,
            unable=Unable(lambda rows: companion.tell(unable=rows)),
            broken=beside.could_not_load,
        )
        claimer.unable = loop.unable.left_alone
        claimer.settled = beside.notices.settled
        beside.dependents.rounds.looks = beside.notices.rounds.looks = lambda: claimer.looks
        self._courier, self._loop = courier, loop
        self._leaving = leaving = Leaving(page.fd)
        companion.token = leaving.kin.token
        status = 1
        try:
            worked = self._run(loop, courier, companion)
            status = 0
            return worked
        finally:
            leaving.ready(status := loop.exit_code or status)
            if not flush():
                self._exit_at_once(status)  # nobody reads what it prints: the interpreter would wait for them
            for restore in reversed(beside.blocked):
                restore()

    def _run(self, loop: EngineLoop, courier: Courier, companion: Companion) -> bool:
        beside = self._beside
        assert beside is not None
        watcher = SignalWatcher(self._stop_signal)
        loop.between = watcher.renew
        clean = False  # out of order, it is missed: the pool goes on expecting it
        try:
            at_home(True)
            watcher.install()
            companion.watch(courier.incarnation)
            try:
                loop.preload()
            except RAISED as error:
                self.log.critical("Worker %s: cannot load a task of PERDURE_TASKS: %s", self.name, error)
                loop.exit_code = status = status_after(error) or 1
                if status == UNFIT_DEVICE:
                    self._depart(courier)
                    self._exit_at_once(status)
                sys.exit(status)
            watcher.renew()
            if courier.holdings.settings.spare:
                beside.stand_by(courier.tend_idle)
            companion.tell(ready=True)
            self.set_state(WorkerStatus.IDLE)
            courier.start()
            beside.start(burst=courier.claimer.limits.burst)
            threading.Thread(target=self._leave_a_stuck_step, args=(courier, loop), name="exit", daemon=True).start()
            loop.run()
            courier.join()
            if courier.failed is not None:
                loop.exit_code = 1
            clean = not loop.exit_code
        finally:
            watcher.remove()
            if not courier.end():
                self.log.error("Worker %s: its courier does not end; leaving without it", self.name)
            self._depart(courier, clean=clean)
            at_home(False)
        if loop.left_behind:
            self.log.warning("Worker %s: the running step did not end in time; leaving without it", self.name)
        if loop.left_behind or loop.fitness.device_error is not None:
            self._exit_at_once(loop.exit_code)
        if loop.exit_code:
            sys.exit(loop.exit_code)
        return courier.claimer.claimed > 0

    def _depart(self, courier: Courier, *, clean: bool = True) -> None:
        """Leave the registries and dismiss the guardian. Redis may be away: then the reaper does it.

        ``clean``: it was told to leave, and is expected no longer.
        """
        assert self._beside is not None
        self._beside.stop(told=bool(self._signals))
        store = courier.store  # the courier's thread has ended, or was never started
        try:
            store.reap(
                incarnation=courier.incarnation,
                kind=FailureKind.WORKER_LOST,
                reason="its worker has exited",
                clean=clean,
            )
            self.teardown()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self.log.warning("Worker %s: cannot sign off in Redis (%s); its guardian will", self.name, error)
            self._beside.companion.abandon()
        else:
            self._beside.companion.dismiss()

    def _leave_a_stuck_step(self, courier: Courier, loop: EngineLoop) -> None:
        """End the process when the courier is done and the main thread sits in a step that does not end."""
        courier.join()
        holdings = courier.holdings
        if holdings.parked.wait(holdings.settings.drain_timeout if courier.failed else 0.5):
            return
        self.log.warning("Worker %s: the running step did not end in time; leaving without it", self.name)
        self._depart(courier, clean=not courier.failed and not loop.exit_code)
        self._exit_at_once(1 if courier.failed else loop.exit_code)

    # --- stopping ------------------------------------------------------------------------------------

    def _exit_at_once(self, status: int) -> NoReturn:
        """Without the end of the interpreter: it would wait for a step, or call a device that may never answer."""
        if self._leaving is not None:
            self._leaving.end_kin()
        flush()
        os._exit(status)

    def _install_signal_handlers(self) -> None:
        """Not RQ's: those raise in the middle of whatever runs, and what was just claimed would be lost."""

    def _stop_signal(self, number: int) -> None:
        """Called by the signal watcher's thread, also while the main thread sits in native code."""
        courier = self._courier
        now = time.monotonic()
        self._signals.append(now)
        if courier is None or self._loop is None:
            os._exit(1)
        if number == UNFIT_SIGNAL:
            self.log.error("Worker %s: its device is not to be used, says its guardian", self.name)
            self._loop.exit_code = UNFIT_DEVICE
        if len(self._signals) == 1:
            self.log.info("Worker %s: %s, warm shut down", self.name, signal.Signals(number).name)
            self._shutdown_requested_date = rq.utils.now()
            courier.holdings.stop()
            if self._beside is not None:
                # One whose device is lost does not leave in order: the pool goes on expecting it.
                self._beside.companion.tell(ready=False if number == UNFIT_SIGNAL else "leaving")
            if not courier.started:
                # It still loads what stands in PERDURE_TASKS, which may take minutes, or waits as a spare; it holds
                # nothing.
                courier.settle_idle()
                self._depart(courier)
                self._exit_at_once(self._loop.exit_code)
        elif now - self._signals[0] >= COLD_AFTER and number != UNFIT_SIGNAL:
            self.log.warning("Worker %s: cold shut down", self.name)
            courier.holdings.stop(cold=True)

    def _rejoined(self, incarnation: str) -> None:
        """Declared dead by mistake, and with that unregistered. Called by the courier's thread."""
        assert self._beside is not None
        assert self._courier is not None
        self._beside.companion.watch(incarnation)
        try:
            # Not over RQ's own connection: its timeout is minutes.
            with self._courier.store.connection.pipeline() as pipeline:
                pipeline.hset(self.key, mapping=self.serialize())
                worker_registration.register(self, pipeline)
                pipeline.expire(self.key, 60)
                pipeline.execute()
        except redis.RedisError as error:
            self.log.warning("Worker %s: cannot register again (%s); it works all the same", self.name, error)

    # --- queues and plain jobs -----------------------------------------------------------------------

    def _next_queues(self) -> list[str]:
        """Queue names in the order that RQ's dequeue strategy asks for, each with its priorities.

        Called by the courier before each claim.
        """
        courier = self._courier
        assert courier is not None
        if self._beside is not None and courier.claimer.limits.burst:
            self._beside.dependents.enqueue()
            self._beside.dependents.clean()
        # As RQ: after what was taken, and by where that came from; the first queue named is the first served.
        taken_from, courier.claimer.taken_from = courier.claimer.taken_from, ""
        for queue in self._ordered_queues if taken_from else ():
            if taken_from in served(queue.name):
                self.reorder_queues(queue)
                break
        # A queue that is named by itself too (gpu gpu-low) is served where it first comes.
        return list(dict.fromkeys(name for queue in self._ordered_queues for name in served(queue.name)))

    def cleanup_execution(self, job: Job, pipeline: Any, execution: Execution | None = None) -> None:
        """RQ's end of an execution, and the end of our lease in the same transaction."""
        super().cleanup_execution(job, pipeline, execution)
        courier = self._courier
        if execution is not None and courier is not None:
            courier.store.settle(pipeline, courier.incarnation, job.origin, job.id, execution.id)

    def run_maintenance_tasks(self) -> None:
        """RQ's, at once, but for its judgement of executions: those are the reaper's."""
        kinds = self.queue_class, self.job_class, self.serializer
        Dependents(self.connection, self.queue_names(), *kinds, self.log).clean()


arrival.greet()
