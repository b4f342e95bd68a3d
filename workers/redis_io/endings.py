"""Endings: how requests leave this worker: finished, failed, stopped, canceled or handed back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.limits import MAX_REQUESTS
from ...protocol.records import FailureKind
from ...protocol.telemetry.logs import about, traced
from ...protocol.transitions.calls import Failure, Finish
from .line import Line


@dataclass(slots=True)
class Endings:
    """For the courier's thread."""

    line: Line

    def end(self) -> None:
        """Send finishes and failures whose outputs are all stored."""
        line, holdings = self.line, self.line.holdings
        with holdings.lock:
            # What one call cannot carry goes out in several before: see Holding.next_progress.
            ready = [
                item
                for item in holdings.held.values()
                if item.leaving and not item.flight and not item.canceling and not item.splits
            ]
            finishes = [item.next_finish(holdings.settings) for item in ready if not isinstance(item.ended, Failure)]
            failures = [item.ended for item in ready if isinstance(item.ended, Failure) and not item.unsent]
        line.send(
            finishes,
            lambda row: len(row.blob) + len(row.result),
            lambda part: line.store.finish(line.incarnation, line.worker, part),
            self._settle,
        )
        line.send(
            failures,
            lambda row: len(row.reason) + len(row.traceback),
            lambda part: line.store.fail(line.incarnation, line.worker, part),
            self._settle,
        )

    def _settle(self, rows: Sequence[Finish | Failure], answers: list[str]) -> None:
        line, holdings = self.line, self.line.holdings
        told: set[str] = set()
        with holdings.lock:
            for row, answer in zip(rows, answers, strict=True):
                holding = holdings.current(row.id, row.execution)
                if holding is None:
                    continue
                if answer.startswith("gap"):
                    holding.ended = None
                    line.hear(holding, answer)
                    continue
                del holdings.held[row.id]
                holdings.wanting = True
                who = about(row.id, row.execution)
                if isinstance(row, Failure):
                    if answer != "lost":
                        line.ledger.left(holding, "failed", row.kind)
                    # Who made a wrong request knows what to change; several that were in one step have one traceback.
                    trace = "" if row.kind is FailureKind.INVALID_REQUEST or row.traceback in told else row.traceback
                    told.add(trace)
                    traced(
                        line.log,
                        logging.WARNING,
                        trace if "\n" in trace.strip() else "",
                        "%s: %s (%s): %s; %s",
                        row.kind,
                        holding.claim.task,
                        row.id,
                        row.reason,
                        answer,
                        extra=who,
                    )
                elif answer == "lost":
                    line.log.warning(
                        "request %s was given to another worker; its result here is dropped", row.id, extra=who
                    )
                else:
                    line.ledger.finished(holding, row)
                    line.log.info("%s: OK (%s), %.2f s", holding.claim.queue, row.id, row.seconds, extra=who)
            holdings.lock.notify_all()

    def stop(self) -> None:
        """Say in Redis which requests RQ's stop commands have named; they end as canceled ones do."""
        line, holdings = self.line, self.line.holdings
        with holdings.lock:
            held = holdings.held.values()
            keys = [item.key for item in held if item.stopping and not item.canceling and not item.finishing]
        line.ask(keys, lambda part: line.store.stop(line.incarnation, part))

    def confirm_cancels(self) -> None:
        """End the requests of whose cancellation this worker has heard."""
        line, holdings = self.line, self.line.holdings
        with holdings.lock:
            keys = [item.key for item in holdings.held.values() if item.canceling]
        for start in range(0, len(keys), MAX_REQUESTS):
            part = keys[start : start + MAX_REQUESTS]
            line.store.cancel(part, reason="canceled while running", incarnation=line.incarnation, worker=line.worker)
            with holdings.lock:
                for name, execution in part:
                    line.log.info("canceled (%s)", name, extra=about(name, execution))
                    if holding := holdings.current(name, execution):
                        line.ledger.left(holding, "canceled")
                    holdings.let_go(name)

    def release(self) -> None:
        """Hand back, one by one, what this worker cannot or must not run, each with its reason."""
        line, holdings = self.line, self.line.holdings
        with holdings.lock:
            waiting = list(holdings.handbacks)
        # From last to first: each goes to the front of its queue.
        for entry in reversed(waiting):
            name = entry.holding.claim.id
            mine = holdings.current(name, entry.holding.claim.execution) is entry.holding
            if mine:
                answers = line.store.release(
                    line.incarnation,
                    line.worker,
                    [entry.holding.key],
                    reason=entry.reason,
                    delay=entry.delay,
                    fingerprints=[entry.fingerprint],
                    unable=entry.unable,
                    longest=entry.longest,
                )
                if answers[0] != "lost":
                    line.ledger.left(entry.holding, "released")
                line.log.warning(
                    "handed back (%s): %s; %s", name, entry.reason, answers[0], extra=about(*entry.holding.key)
                )
            with holdings.lock:
                holdings.handbacks.remove(entry)
                if mine:
                    holdings.let_go(name)

    def release_all(self, reason: str) -> None:
        """Hand back all requests that are held."""
        line, holdings = self.line, self.line.holdings
        with holdings.lock:
            rest = [item.key for item in holdings.held.values() if not item.claim.plain]
        # Parts too from last to first, for the order in front of the queue.
        for part in reversed([rest[start : start + MAX_REQUESTS] for start in range(0, len(rest), MAX_REQUESTS)]):
            line.store.release(line.incarnation, line.worker, part, reason=reason)
            with holdings.lock:
                for name, _ in part:
                    if holding := holdings.held.pop(name, None):
                        line.ledger.left(holding, "released")
        if rest:
            line.log.info("Worker %s: %d request(s) handed back", line.worker, len(rest))
