"""The rows of the part ``recovery``: ours by default and with a timeout of half a second, others at their fastest."""

from __future__ import annotations

from collections.abc import Sequence

from .measures.recovery import Scenario
from .systems import PEERS, QUEUE

_OWN_PRODUCER = (str(PEERS / "bench_perdure.py"), "walk")
_OWN_WORKER = ("-P", "-m", "rq.cli", "worker", "-w", "perdure.workers.Worker", "--quiet", QUEUE)
_REAPER = ("-P", "-m", "perdure.recovery")
_RQ = (
    "-P",
    "-m",
    "rq.cli",
    "worker",
    "--quiet",
    "--job-monitoring-interval",
    "1",
    "--maintenance-interval",
    "1",
    "--worker-ttl",
    "16",
    "-w",
)

_HALF = {"PERDURE_HEARTBEAT": "0.1", "PERDURE_HEARTBEAT_TIMEOUT": "0.5", "PERDURE_REAP_INTERVAL": "0.1"}
_HALF_STEP = {**_HALF, "PERDURE_HEARTBEAT_TIMEOUT": "5", "PERDURE_STEP_TIMEOUT": "0.5"}


def _own(name: str, kind: str, how: str, variables: dict[str, str] | None = None, most: int = 1_000_000) -> Scenario:
    return Scenario(
        name=f"perdure: {name}",
        kind=kind,
        producer=_OWN_PRODUCER,
        worker=_OWN_WORKER,
        how=how,
        reaper=_REAPER,
        variables=variables or {},
        most=most,
    )


OWN: Sequence[Scenario] = (
    _own("worker", "worker", "kill -9 of the worker, its guardian lives; defaults"),
    _own(
        "tree (0.5 s)",
        "tree",
        "kill -9 of worker and guardian; heartbeat timeout 0.5 s, beats and sweeps every 0.1 s",
        _HALF,
    ),
    _own("tree", "tree", "kill -9 of worker and guardian; defaults"),
    _own("hang (0.5 s)", "hang", "a step that holds the interpreter's lock; step timeout 0.5 s", _HALF_STEP),
    _own("hang", "hang", "a step that holds the interpreter's lock; defaults", most=5),
)

PEERS_OF_RECOVERY: Sequence[Scenario] = (
    Scenario(
        name="bullmq", kind="tree", producer=(str(PEERS / "bench_bullmq.cjs"), "serve"),
        worker=(str(PEERS / "bench_bullmq.cjs"), "walk"), how="lock of 1 s, looked after every 0.5 s",
        environment="bullmq",
    ),
    Scenario(
        name="docket", kind="tree", producer=(str(PEERS / "bench_docket.py"), "serve"),
        worker=(str(PEERS / "bench_docket.py"), "work"),
        how="redelivery after 1 s, looked after every 0.1 s", environment="docket",
    ),
    Scenario(
        name="dramatiq", kind="tree", producer=(str(PEERS / "bench_dramatiq.py"),),
        worker=("-m", "dramatiq", "bench_dramatiq", "--processes", "1", "--threads", "1"),
        how="heartbeat timeout 1 s, maintenance with every command", environment="dramatiq",
        variables={"BENCH_FAST": "1", "dramatiq_queue_prefetch": "1"},
    ),
    Scenario(
        name="rq SimpleWorker", kind="tree", producer=(str(PEERS / "bench_rq.py"),),
        worker=(*_RQ, "rq.worker.SimpleWorker", QUEUE), how="Retry, monitoring and maintenance every second", most=5,
    ),
    Scenario(
        name="rq Worker", kind="tree", producer=(str(PEERS / "bench_rq.py"),),
        worker=(*_RQ, "rq.worker.Worker", QUEUE), how="Retry, monitoring and maintenance every second", most=5,
    ),
)  # fmt: skip
