"""The metrics: a census of the pool in the words of Prometheus.

:data:`METRICS` is the list of all names; documentation, dashboard and alert rules are checked against it. A name
without a sample still has its lines of HELP and TYPE. No request id is a label: the values of every label are few
(queues and workers up to a limit, failure kinds, priorities, states).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import redis
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ... import __version__
from ...protocol.keys import priority_of
from ...protocol.queries.census import Census, Surveyor
from ...protocol.records import FailureKind
from ...protocol.telemetry.measures import MEASURES, Histogram, counts, histograms

FRESH: Final = 1.0
"""Seconds for which a census is shown again: however many ask, Redis is asked once."""

Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Described:
    """One metric: its type, its labels, and a sentence for people."""

    kind: str
    labels: tuple[str, ...]
    help: str


def _counter(help: str, *labels: str) -> Described:
    return Described("counter", labels, help)


def _gauge(help: str, *labels: str) -> Described:
    return Described("gauge", labels, help)


def _histogram(name: str, help: str) -> Described:
    return Described("histogram", MEASURES[name].labels, help)


METRICS: Final[Mapping[str, Described]] = {
    # What became of requests.
    "perdure_requests_submitted_total": _counter("Requests stored.", "queue"),
    "perdure_requests_refused_total": _counter("Submits that a degraded pool has refused.", "queue"),
    "perdure_requests_claimed_total": _counter("Executions begun, those of plain RQ jobs too.", "queue"),
    "perdure_requests_finished_total": _counter(
        "Requests ended, by outcome: finished, failed, canceled.", "queue", "outcome"
    ),
    "perdure_requests_released_total": _counter("Executions handed back unharmed, at a drain for example.", "queue"),
    "perdure_requests_requeued_total": _counter("Ended requests that a person sent back to their queue.", "queue"),
    "perdure_retries_total": _counter(
        "Executions after which the request is to run again, by why they ended.", "queue", "reason"
    ),
    "perdure_dead_letters_total": _counter("Requests that failed for good, by why.", "queue", "reason"),
    "perdure_resumes_total": _counter(
        "Executions that went on from a checkpoint, by why the one before ended.", "queue", "reason"
    ),
    "perdure_resumed_outputs_total": _counter(
        "Outputs that were stored before a resume, and not computed again.", "queue"
    ),
    "perdure_restarts_total": _counter(
        "Requests that began again from zero although they had put something out.", "queue"
    ),
    "perdure_lease_losses_total": _counter(
        "Leases taken from their holder by a reaper or a guardian, by why.", "queue", "reason"
    ),
    "perdure_fenced_writes_total": _counter("Writes refused because another execution holds the request.", "queue"),
    "perdure_suspected_total": _counter("Requests made suspect after a crash or a hang.", "queue"),
    "perdure_generation_tokens_total": _counter("Outputs stored; one is a token in text generation.", "queue"),
    "perdure_checkpoints_total": _counter("Checkpoints stored.", "queue"),
    "perdure_lease_renewals_total": _counter("Leases renewed, by a checkpoint or alone."),
    "perdure_workers_ended_total": _counter("Worker processes that are gone, by why; LEFT is in order.", "reason"),
    "perdure_degradations_total": _counter("Times that the pool has become degraded."),
    # How long things take.
    "perdure_queue_time_seconds": _histogram(
        "queue_time", "From coming into the queue to a claim, for each execution."
    ),
    "perdure_time_to_first_token_seconds": _histogram(
        "time_to_first_token", "From the submit until the first output is stored."
    ),
    "perdure_time_per_output_token_seconds": _histogram(
        "time_per_output_token", "Mean time between outputs of a finishing execution."
    ),
    "perdure_e2e_request_latency_seconds": _histogram(
        "e2e_request_latency", "From the submit until the result is stored."
    ),
    "perdure_recovery_seconds": _histogram(
        "recovery", "From the last thing stored by an execution that was lost or handed back to the first of the next."
    ),
    "perdure_checkpoint_seconds": _histogram("checkpoint", "Round trip of a call that stores checkpoints."),
    "perdure_checkpoint_interval_seconds": _histogram(
        "checkpoint_interval", "Time from one checkpoint to the next; longer than the setting while Redis is busy."
    ),
    "perdure_checkpoint_bytes": _histogram("checkpoint_bytes", "Outputs and state of one checkpoint, as packed."),
    # How it stands.
    "perdure_requests_waiting": _gauge("Requests in a queue, suspects included.", "queue", "priority"),
    "perdure_requests_scheduled": _gauge("Requests that wait for a due time: retries and delayed ones.", "queue"),
    "perdure_requests_running": _gauge("Requests and plain jobs held by workers.", "queue"),
    "perdure_oldest_waiting_seconds": _gauge("How long the oldest at the head of the queue has waited.", "queue"),
    "perdure_suspects": _gauge("Requests that wait for limited company.", "queue"),
    "perdure_leases_overdue": _gauge("Leases that have expired and not been taken yet.", "queue"),
    "perdure_dead_letters": _gauge("Failed requests and jobs that are kept.", "queue"),
    "perdure_checkpoints": _gauge("Requests with a checkpoint."),
    "perdure_checkpoint_age_seconds": _gauge("Age of the oldest checkpoint."),
    "perdure_workers": _gauge("Living workers: ready, or loading (which a spare does too).", "state"),
    "perdure_workers_expected": _gauge(
        "Workers that there should be: the configured capacity, or the most of the last hour."
    ),
    "perdure_degraded_mode": _gauge("1 for the mode that the pool is in: normal or degraded.", "mode"),
    "perdure_workers_unable": _gauge("Workers that could not load some task; 'perdure workers' says which, and why."),
    "perdure_circuit_open": _gauge("1 for each device that is not to be used; 'perdure workers' says why.", "gpu"),
    "perdure_reaper_pulse_age_seconds": _gauge("Since the last sweep of any reaper or guardian."),
    "perdure_redis_up": _gauge("Whether Redis answered this scrape."),
    "perdure_redis_used_memory_bytes": _gauge("Memory that Redis uses."),
    "perdure_redis_used_memory_ratio": _gauge("Of maxmemory; left out where there is no limit."),
    "perdure_redis_evicted_keys_total": _counter("Keys that Redis has thrown away: each may have been a request."),
    "perdure_redis_aof_enabled": _gauge("Whether what was accepted survives the end of Redis."),
    "perdure_redis_aof_write_ok": _gauge("Whether the last write of the append-only file succeeded."),
    "perdure_left_out": _gauge("What is not told because there is more than the limit.", "what"),
    "perdure_scrape_seconds": _gauge("How long this look at Redis took."),
    "perdure_build_info": _gauge("1, with the release that serves this page.", "version"),
    # What rq-exporter calls the same, so that its dashboards go on.
    "rq_workers": _gauge("RQ workers, stock ones too.", "name", "state", "queues"),
    "rq_workers_success_total": _counter("Jobs that a worker has finished.", "name", "queues"),
    "rq_workers_failed_total": _counter("Jobs that have failed on a worker.", "name", "queues"),
    "rq_workers_working_time_total": _counter("Seconds that a worker has worked.", "name", "queues"),
    "rq_jobs": _gauge("Jobs by status; retries of requests are scheduled.", "queue", "status"),
}
"""Every metric that is served, under the name of its samples (a histogram's without suffix)."""

_BY_QUEUE: Final = {
    "perdure_requests_submitted_total": "submitted", "perdure_requests_refused_total": "refused",
    "perdure_requests_claimed_total": "claimed", "perdure_requests_released_total": "released",
    "perdure_requests_requeued_total": "requeued", "perdure_resumed_outputs_total": "kept",
    "perdure_restarts_total": "restarts", "perdure_fenced_writes_total": "fenced",
    "perdure_suspected_total": "suspected", "perdure_generation_tokens_total": "outputs",
    "perdure_checkpoints_total": "checkpoints",
}  # fmt: skip

_BY_REASON: Final = {
    "perdure_retries_total": "again", "perdure_dead_letters_total": "dead", "perdure_resumes_total": "resumed",
    "perdure_lease_losses_total": "lost",
}  # fmt: skip

_WATCHED: Final = ("perdure_dead_letters_total", "perdure_lease_losses_total")

_HISTOGRAMS: Final = {
    f"perdure_{name}" if name.endswith("_bytes") else f"perdure_{name}_seconds": name for name in MEASURES
}

_OUTCOMES: Final = ("finished", "failed", "canceled")
_STATUSES: Final = {
    "started": "wip", "finished": "finished", "failed": "failed", "canceled": "canceled", "deferred": "deferred",
}  # fmt: skip


def samples(census: Census) -> dict[str, Samples]:
    """The samples of counters and gauges, by the names of :data:`METRICS`; what cannot be known is not among them."""
    queues = census.queues
    found: dict[str, Samples] = {}
    for name, event in _BY_QUEUE.items():
        # A queue without any is at 0: a rate over a counter that appears at 1 would miss the first.
        found[name] = [((queue,), census.counters.get(f"{event}:{queue}", 0)) for queue in queues]
    for name, event in _BY_REASON.items():
        # For what rules watch, every kind is there from the start, at 0, for the same reason.
        kinds = FailureKind if name in _WATCHED else ()
        rows = {(queue, str(kind)): 0 for queue in queues for kind in kinds} | counts(census.counters, event, 2)
        found[name] = [(labels, number) for labels, number in rows.items() if labels[0] in queues]
    found["perdure_requests_finished_total"] = [
        ((queue, outcome), census.counters.get(f"{outcome}:{queue}", 0)) for queue in queues for outcome in _OUTCOMES
    ]
    ends: dict[tuple[str, ...], int] = {(str(kind),): 0 for kind in FailureKind}
    found["perdure_workers_ended_total"] = list((ends | counts(census.counters, "left", 1)).items())
    found["perdure_lease_renewals_total"] = [((), census.counters.get("renewals", 0))]
    found["perdure_degradations_total"] = [((), census.counters.get("degraded", 0))]
    found["perdure_requests_waiting"] = [
        ((queue, priority_of(queue)), item.waiting + item.suspects) for queue, item in queues.items()
    ]
    for name, field in (
        ("perdure_requests_scheduled", "retries"),
        ("perdure_requests_running", "running"),
        ("perdure_suspects", "suspects"),
        ("perdure_oldest_waiting_seconds", "oldest"),
        ("perdure_leases_overdue", "overdue"),
    ):
        found[name] = [((queue,), getattr(item, field)) for queue, item in queues.items()]
    found["perdure_dead_letters"] = [((queue,), item.registries["failed"]) for queue, item in queues.items()]
    found["perdure_checkpoints"] = [((), census.checkpoints)]
    found["perdure_checkpoint_age_seconds"] = [((), census.checkpoint_age)]
    found["perdure_workers"] = [(("ready",), census.ready), (("loading",), census.loading)]
    found["perdure_workers_expected"] = [((), census.expected)]
    found["perdure_degraded_mode"] = [(("degraded",), census.degraded), (("normal",), not census.degraded)]
    found["perdure_workers_unable"] = [((), census.unable)]
    found["perdure_circuit_open"] = [((place,), 1) for place in census.unfit]
    if census.pulse_age is not None:
        found["perdure_reaper_pulse_age_seconds"] = [((), census.pulse_age)]
    found["perdure_left_out"] = [((what,), number) for what, number in census.left_out.items()]
    found["perdure_build_info"] = [((__version__,), 1)]
    return found | _server(census.server) | _rq(census)


def _server(info: Mapping[str, Any]) -> dict[str, Samples]:
    found: dict[str, Samples] = {}
    if "used_memory" in info:
        found["perdure_redis_used_memory_bytes"] = [((), info["used_memory"])]
        if limit := info.get("maxmemory"):
            found["perdure_redis_used_memory_ratio"] = [((), info["used_memory"] / limit)]
    if "evicted_keys" in info:
        found["perdure_redis_evicted_keys_total"] = [((), info["evicted_keys"])]
    if "aof_enabled" in info:
        found["perdure_redis_aof_enabled"] = [((), info["aof_enabled"])]
        found["perdure_redis_aof_write_ok"] = [((), info.get("aof_last_write_status") == "ok")]
    return found


def _rq(census: Census) -> dict[str, Samples]:
    workers = census.workers
    jobs = []
    for queue, item in census.queues.items():
        jobs.append(((queue, "queued"), item.waiting + item.suspects))
        jobs.append(((queue, "scheduled"), item.registries["scheduled"] + item.retries))
        jobs += [((queue, status), item.registries[registry]) for status, registry in _STATUSES.items()]
    return {
        "rq_workers": [((item.name, item.state, item.queues), 1) for item in workers],
        "rq_workers_success_total": [((item.name, item.queues), item.succeeded) for item in workers],
        "rq_workers_failed_total": [((item.name, item.queues), item.failed) for item in workers],
        "rq_workers_working_time_total": [((item.name, item.queues), item.seconds) for item in workers],
        "rq_jobs": jobs,
    }


class PoolCollector(Collector):
    """What ``prometheus_client`` asks at each scrape. For any number of threads; Redis being away is a sample."""

    def __init__(self, surveyor: Surveyor) -> None:
        self._surveyor = surveyor
        self._lock = threading.Lock()
        self._taken = 0.0
        self._seconds = 0.0
        self._census: Census | None = None

    def describe(self) -> Iterable[Metric]:
        """The names alone: registering costs no look at Redis."""
        return [_family(name) for name in METRICS]

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if not self._taken or time.monotonic() - self._taken >= FRESH:
                self._look()
            census, seconds = self._census, self._seconds
        found = samples(census) if census is not None else {}
        found["perdure_redis_up"] = [((), census is not None)]
        found["perdure_scrape_seconds"] = [((), seconds)]
        read = histograms(census.counters) if census is not None else {}
        for name in METRICS:
            family = _family(name)
            if name in _HISTOGRAMS:
                for labels, entry in read.get(_HISTOGRAMS[name], {}).items():
                    if not labels or census is None or labels[0] in census.queues:
                        _add(family, _HISTOGRAMS[name], labels, entry)
            else:
                for labels, value in found.get(name, ()):
                    family.add_metric(labels, float(value))
            yield family

    def _look(self) -> None:
        began = time.monotonic()
        try:
            self._census = self._surveyor.take()
        except (redis.RedisError, OSError):
            # Old figures would say that all is well.
            self._census = None
            self._surveyor.connection.connection_pool.disconnect()
        self._taken = time.monotonic()
        self._seconds = self._taken - began


def _family(name: str) -> Any:
    described = METRICS[name]
    match described.kind:
        case "counter":
            return CounterMetricFamily(name.removesuffix("_total"), described.help, labels=described.labels)
        case "gauge":
            return GaugeMetricFamily(name, described.help, labels=described.labels)
        case _:
            return HistogramMetricFamily(name, described.help, labels=described.labels)


def _add(family: HistogramMetricFamily, name: str, labels: tuple[str, ...], entry: Histogram) -> None:
    texts = [f"{float(text)}" for text in MEASURES[name].texts[:-1]] + ["+Inf"]
    family.add_metric(labels, list(zip(texts, accumulate(entry.hits), strict=True)), entry.total)
