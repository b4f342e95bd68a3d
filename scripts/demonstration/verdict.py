"""What a demonstration has shown: counts, and whether they are what was promised. Pure: records in, figures out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from .run import INTERRUPTED, SLACK, Answer, DemoKill, Record, most_within


@dataclass(frozen=True, slots=True)
class Row:
    """One request: its workers in order, tokens of the answer, tokens sampled more than once and how many may be."""

    id: str
    workers: list[str]
    tokens: int
    recomputed: int
    allowed: int
    interruptions: int
    equal: bool
    lost: bool
    duplicated: int
    text: str


@dataclass(slots=True)
class DemoVerdict:
    """All figures. ``problems`` is empty if everything promised was shown."""

    rows: list[Row] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return sum(row.lost for row in self.rows)

    @property
    def duplicated(self) -> int:
        return sum(row.duplicated for row in self.rows)

    @property
    def different(self) -> int:
        return sum(not row.equal for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; times in milliseconds."""
        return {
            "requests": len(self.rows),
            "kills": len(self.kills),
            "interrupted": sum(row.interruptions > 0 for row in self.rows),
            "lost": self.lost,
            "duplicated": self.duplicated,
            "different": self.different,
            "tokens": sum(row.tokens for row in self.rows),
            "recomputed": sum(row.recomputed for row in self.rows),
            "recovery_ms": {kill["kind"]: kill["recovery_ms"] for kill in self.kills},
            "passed": not self.problems,
            "problems": self.problems,
            "kill_details": self.kills,
            "request_details": [
                {
                    "id": row.id, "workers": row.workers, "tokens": row.tokens, "recomputed": row.recomputed,
                    "allowed": row.allowed, "interruptions": row.interruptions, "equal": row.equal, "lost": row.lost,
                    "duplicated": row.duplicated,
                }
                for row in self.rows
            ],
        }  # fmt: skip


def judge(record: Record) -> DemoVerdict:
    """Count, and name everything that is not as promised."""
    verdict = DemoVerdict()
    for number, answer in enumerate(record.answers):
        golden = record.golden[number] if number < len(record.golden) else None
        verdict.rows.append(_row(record, answer, golden))
    verdict.kills = [_kill(record, kill) for kill in record.kills]
    verdict.problems = _problems(verdict)
    return verdict


def _row(record: Record, answer: Answer, golden: dict[str, Any] | None) -> Row:
    name = answer.handle.id
    result = answer.result or {}
    stored = record.logs.get(name, [])
    expected = golden["outputs"] if golden is not None else []
    text = "".join(output["text"] for output in answer.outputs)
    # Seen twice by the client, standing twice in the log, or ended twice.
    extra = max(0, len(answer.outputs) - len(expected), len(stored) - len(expected))
    duplicated = extra + max(0, record.entries.get(name, 0) - 1)
    equal = golden is not None and result == golden["result"] and text == result.get("text")
    equal = equal and answer.outputs == expected == stored
    sampled, pids = _sampled(record, name)
    kills = [kill for kill, _ in _interruptions(record, name)]
    interval = record.settings.checkpoint_interval
    return Row(
        id=name,
        workers=[record.workers.get(pid, str(pid)) for pid in pids],
        tokens=len(result.get("token_ids", [])),
        recomputed=sum(sampled.values()) - len(sampled),
        allowed=sum(most_within(record.trace, name, kill.pid, interval) + SLACK for kill in kills),
        interruptions=len(kills),
        equal=equal,
        lost=answer.result is None,
        duplicated=duplicated,
        text=str(result.get("text", answer.error)),
    )


def _sampled(record: Record, name: str) -> tuple[dict[int, int], list[int]]:
    """From the engines' trace: how often each output was sampled, and by which processes in order."""
    counts: dict[int, int] = defaultdict(int)
    pids: dict[int, None] = {}
    for line in sorted(record.trace, key=lambda item: item["at"]):
        for request, _, index, kind in line["rows"]:
            if request == name and kind == "decode":
                counts[index] += 1
                pids[line["pid"]] = None
    return dict(counts), list(pids)


def _interruptions(record: Record, name: str) -> list[tuple[DemoKill, int]]:
    """The kills that took this request from its worker, with the outputs that were stored by then."""
    lost = [event for event in record.histories.get(name, []) if event.kind == "WORKER_LOST"]
    return [
        (kill, event.offset)
        for kill in record.kills
        for event in lost
        if event.worker == kill.worker and event.event in ("redelivered", "retry")
    ]


def _kill(record: Record, kill: DemoKill) -> dict[str, Any]:
    """One kill: what it interrupted, and the time until the first and the last of these went on elsewhere."""
    delays = []
    interrupted = 0
    for answer in record.answers:
        for other, offset in _interruptions(record, answer.handle.id):
            if other is not kill or offset < 1:
                continue
            interrupted += 1
            if offset < len(answer.times):
                # The output after the last one that was stored: nobody can have computed it here but another worker.
                delays.append((answer.times[offset] - kill.at) * 1000)
    return {
        "kind": kill.kind,
        "worker": record.workers.get(kill.pid, ""),
        "pid": kill.pid,
        "held": len(kill.held),
        "interrupted": interrupted,
        "recovery_ms": round(min(delays), 1) if delays else None,
        "last_recovery_ms": round(max(delays), 1) if delays else None,
    }


def _problems(verdict: DemoVerdict) -> list[str]:
    problems = []
    for row in verdict.rows:
        if row.lost:
            problems.append(f"request {row.id} was lost: {row.text}")
        elif not row.equal:
            problems.append(f"request {row.id} has another answer than without a crash")
        if row.duplicated:
            problems.append(f"request {row.id} has {row.duplicated} outputs or ends too many")
        if row.recomputed > row.allowed:
            problems.append(
                f"request {row.id} sampled {row.recomputed} tokens again; a checkpoint interval allows {row.allowed}"
            )
    kinds = [kill["kind"] for kill in verdict.kills]
    if kinds != ["worker", "tree"]:
        problems.append(f"the kills were {kinds or 'none'}, not one worker and one tree: the answers ended too early")
    for kill in verdict.kills:
        if kill["interrupted"] < INTERRUPTED:
            problems.append(
                f"the kill of {kill['kind']} interrupted {kill['interrupted']} requests with written outputs"
            )
        if kill["recovery_ms"] is None:
            problems.append(f"after the kill of {kill['kind']} no interrupted request went on elsewhere")
    return problems
