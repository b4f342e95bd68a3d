"""Who has kept what was promised: evidence in, counts out. Pure.

The counts are those of Jepsen's total queue: what was accepted ends exactly once (``lost``, ``duplicated``), nothing
ends that nobody asked for (``unexpected``), and what was submitted with an unknown outcome may have been stored
(``recovered``). Then what Perdure promises beyond a queue.

A stale write is found without believing any worker. Each output names the execution that computed it; each time an
execution ended, Redis wrote into the request's history which one it was and how many outputs were stored at that
moment. So every place in the log has one owner, and an output of any other execution was written by one that no
longer held the request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from .evidence import Evidence, Sample, Seen, StoredRequest
from .load import BLEND, WALK, WORDS
from .schedule import NAMES
from .tasks import FIRST, OTHER, first, golden

TURNS: Final = ("redelivered", "retry", "released", "failed", "canceled")
"""Events of the history that end an execution."""

ENDS: Final = ("finished", "failed", "canceled", "stopped")

POISONS: Final = {"raises": ("ERROR", "WORKER_LOST", "CRASH", "HANG"), "exits": ("WORKER_LOST", "CRASH", "HANG")}
"""How a request that does harm each time may end: other faults may end its workers as well."""

SHOWN: Final = 20
"""Problems of each sort that are spelled out."""


@dataclass(slots=True)
class ChaosVerdict:
    """All counts. ``problems`` is empty if everything promised was kept."""

    attempted: int = 0
    accepted: int = 0
    recovered: int = 0
    finished: int = 0
    refused: int = 0
    poisoned: int = 0
    resumed: int = 0
    restarted: int = 0
    lost: int = 0
    duplicated: int = 0
    unexpected: int = 0
    stale_writes: int = 0
    wrong_outputs: int = 0
    charged: int = 0
    leaked_keys: int = 0
    outputs: int = 0
    checkpoints_read: int = 0
    problems: list[str] = field(default_factory=list)
    _said: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def find(self, count: str, text: str, number: int = 1) -> None:
        """Count something that should not be, and say what it is."""
        setattr(self, count, getattr(self, count) + number)
        self.say(count, f"{count.replace('_', ' ')}: {text}")

    def say(self, sort: str, text: str) -> None:
        self._said[sort] += 1
        if self._said[sort] <= SHOWN:
            self.problems.append(text)
        elif self._said[sort] == SHOWN + 1:
            self.problems.append(f"{sort.replace('_', ' ')}: and more of this")


def judge(evidence: Evidence) -> ChaosVerdict:
    """Count, and name everything that is not as promised."""
    verdict = ChaosVerdict(attempted=len(evidence.seen))
    answers = {_frozen(payload): answer for payload, answer in evidence.words}
    for name, seen in evidence.seen.items():
        stored = evidence.stored.get(name)
        verdict.accepted += seen.accepted
        verdict.outputs += len(seen.outputs)
        if stored is not None:
            verdict.recovered += not seen.accepted
            _request(verdict, seen, stored, answers)
        elif seen.accepted or seen.ends:
            verdict.find("lost", f"{name} was accepted, and Redis knows nothing of it")
    for name in evidence.strangers:
        verdict.find("unexpected", f"nobody has submitted {name}")
    for name in evidence.leaks:
        verdict.find("leaked_keys", name)
    _samples(verdict, evidence)
    _faults(verdict, evidence)
    return verdict


def _request(verdict: ChaosVerdict, seen: Seen, stored: StoredRequest, answers: dict[Any, dict[str, Any]]) -> None:
    name, refused = seen.id, bool(seen.payload.get("refuse"))
    restarts = sum(event.event == "restart" for event in stored.history)
    verdict.restarted += restarts > 0
    if len(stored.entries) > 1 or len(seen.ends) > 1 or len(stored.registries) > 1:
        extra = max(len(stored.entries), len(seen.ends), len(stored.registries)) - 1
        verdict.find("duplicated", f"{name} ended {extra + 1} times", extra)
    if stored.status not in ENDS or stored.execution:
        verdict.find("lost", f"{name} has not ended: {stored.status}, {_past(stored)}")
        return
    if not stored.entries:
        verdict.find("lost", f"{name} is {stored.status}, but has no entry in its results")
        return
    if refused:
        if (stored.status, stored.kind) != ("failed", "INVALID_REQUEST"):
            verdict.find("wrong_outputs", f"{name} is {stored.status} {stored.kind}, and should have been refused")
        verdict.refused += 1
        return
    if poison := seen.payload.get("poison"):
        if stored.status != "failed" or stored.kind not in POISONS[poison["kind"]]:
            verdict.find(
                "wrong_outputs", f"{name} is {stored.status} {stored.kind}, and it does harm each time; {_past(stored)}"
            )
        verdict.poisoned += 1
        return
    if stored.status != "finished":
        verdict.find("lost", f"{name} ended as {stored.status} {stored.kind}: {stored.reason}; {_past(stored)}")
        return
    verdict.finished += 1
    if stored.attempt:
        verdict.find("charged", f"{name}: {stored.attempt} attempts, and nothing was its own fault; {_past(stored)}")
    verdict.resumed += _resumed(stored)
    for end in seen.ends:
        if end["status"] != "finished" or end.get("result") != stored.result:
            verdict.find(
                "wrong_outputs", f"{name}: its producer was told {_short(end)}, Redis has {_short(stored.result)}"
            )
    if seen.task == WORDS:
        _text(verdict, seen, stored, answers.get(_frozen(seen.payload)))
    else:
        _values(verdict, seen, stored, restarts)
        _owners(verdict, name, stored)


def _values(verdict: ChaosVerdict, seen: Seen, stored: StoredRequest, restarts: int) -> None:
    """The outputs of ``walk`` and ``Blend``, in Redis and as they were streamed."""
    name, number = seen.id, seen.payload["n"]
    result = stored.result if isinstance(stored.result, dict) else {}
    model = "" if seen.task == WALK else str(result.get("model"))
    expected = _golden(seen.payload["seed"], number, model)
    indices = [output[0] for output in stored.outputs]
    if len(set(indices)) < len(indices):
        verdict.find("duplicated", f"{name} has outputs twice in its log: {indices}")
    elif [output[1] for output in stored.outputs] != expected or indices != list(range(number)):
        verdict.find("wrong_outputs", f"{name}: its log is not the golden answer ({len(indices)} of {number} outputs)")
    if result.get("n") != number or result.get("last") != (expected[-1] if expected else None):
        verdict.find("wrong_outputs", f"{name}: its result {_short(result)} is not the golden one")
    # Another model may have put out what was streamed before the request began again.
    models = [model] if not restarts or seen.task == WALK else [FIRST, OTHER]
    valid = [_golden(seen.payload["seed"], number, item) for item in models]
    _streamed(
        verdict,
        seen,
        number,
        restarts,
        lambda index, output: (
            any(values[index] == output[1] for values in valid)
            and (restarts > 0 or index >= len(stored.outputs) or output == stored.outputs[index])
        ),
    )


def _text(verdict: ChaosVerdict, seen: Seen, stored: StoredRequest, answer: dict[str, Any] | None) -> None:
    """The outputs of text generation."""
    if answer is None:
        verdict.find("wrong_outputs", f"{seen.id}: there is no golden answer to compare it with")
        return
    expected = answer["outputs"]
    if len(stored.outputs) > len(expected):
        extra = len(stored.outputs) - len(expected)
        verdict.find("duplicated", f"{seen.id} has {extra} outputs too many", extra)
    elif stored.outputs != expected or stored.result != answer["result"]:
        verdict.find("wrong_outputs", f"{seen.id}: another text than without a fault")
    _streamed(verdict, seen, len(expected), 0, lambda index, output: output == expected[index])


def _streamed(verdict: ChaosVerdict, seen: Seen, number: int, restarts: int, valid: Any) -> None:
    """Gapless, in order, each once; a stream begins again only where the request did."""
    due = 0
    for _, index, output in seen.outputs:
        if index == 0 and due > 0 and restarts > 0:
            restarts -= 1
            due = 0
        if index < due:
            verdict.find("duplicated", f"{seen.id}: its stream gave output {index} again")
            return
        if index > due or index >= number:
            verdict.find("wrong_outputs", f"{seen.id}: its stream gave output {index}, where {due} of {number} was due")
            return
        if not valid(index, output):
            verdict.find("wrong_outputs", f"{seen.id}: its stream gave {_short(output)} as output {index}")
            return
        due = index + 1
    if seen.ends and due != number:
        verdict.find("wrong_outputs", f"{seen.id}: its stream ended after {due} of {number} outputs")


def _owners(verdict: ChaosVerdict, name: str, stored: StoredRequest) -> None:
    owners: list[str] = []
    for event in stored.history:
        if event.event == "restart":
            owners = []
        elif event.event in TURNS:
            owners = owners[: event.offset] + [event.execution] * (event.offset - len(owners))
    final = stored.last.partition(":")[0]
    for place, output in enumerate(stored.outputs):
        owner = owners[place] if place < len(owners) else final
        if output[2] != owner:
            verdict.find("stale_writes", f"{name}: output {place} is of execution {output[2]}, but {owner} held it")


def _samples(verdict: ChaosVerdict, evidence: Evidence) -> None:
    """Every checkpoint that was read is a prefix of the answer, and none is shorter than one before it."""
    longest: dict[tuple[str, int], Sample] = {}
    for sample in evidence.samples:
        seen = evidence.seen.get(sample.id)
        if seen is None or sample.at < seen.at:
            continue
        verdict.checkpoints_read += 1
        before = longest.get((sample.id, sample.epoch))
        if before is not None and (sample.seq, sample.offset) < (before.seq, before.offset):
            verdict.find(
                "wrong_outputs", f"{sample.id}: a checkpoint went back from {before.offset} to {sample.offset}"
            )
        longest[sample.id, sample.epoch] = sample
        if seen.task == WALK and sample.state is not None:
            values = [first(seen.payload["seed"]), *_golden(seen.payload["seed"], seen.payload["n"], "")]
            place = sample.state["i"]
            if place != sample.offset or place >= len(values) or values[place] != sample.state["v"]:
                verdict.find(
                    "wrong_outputs", f"{sample.id}: its checkpoint at {sample.offset} is no prefix of its answer"
                )


def _faults(verdict: ChaosVerdict, evidence: Evidence) -> None:
    for kind in evidence.enabled:
        if not any(fired.kind == kind for fired in evidence.fired):
            verdict.say("faults", f"the fault {kind} ({NAMES[kind].text}) was asked for and has not happened once")
    for line in evidence.broken:
        verdict.say("producers", line)
    if not verdict.accepted:
        verdict.say("faults", "no request was accepted: nothing was tested")


def _resumed(stored: StoredRequest) -> bool:
    """Whether it went on from a checkpoint with outputs."""
    found = False
    for event in stored.history:
        if event.event == "restart":
            found = False
        elif event.event in TURNS and event.offset:
            found = True
    return found


@lru_cache(maxsize=4096)
def _golden(seed: int, number: int, model: str) -> list[str]:
    return golden(seed, number, model)


def _frozen(payload: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(payload.items()))


def _past(stored: StoredRequest) -> str:
    return ", ".join(f"{event.event} {event.kind}".strip() for event in stored.history[-6:]) or "without a history"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def recoveries(evidence: Evidence) -> dict[str, list[float]]:
    """Seconds of each fault of each kind until what it had interrupted went on.

    For one with victims: until the first output (or the end) by another execution, of the last of them to go on. For
    one without: from its end to the first output that any producer saw.
    """
    moments = sorted(at for seen in evidence.seen.values() for at, _, _ in seen.outputs)
    found: dict[str, list[float]] = defaultdict(list)
    for fired in evidence.fired:
        delays = [delay for item in fired.held.items() if (delay := _delay(evidence, fired.at, *item)) is not None]
        if delays:
            found[fired.kind].append(max(delays))
        elif not fired.held and fired.healed > fired.at:
            later = _after(moments, fired.healed)
            if later is not None:
                found[fired.kind].append(later - fired.healed)
    return dict(found)


def _delay(evidence: Evidence, at: float, name: str, execution: str) -> float | None:
    seen = evidence.seen.get(name)
    if seen is None or seen.task not in (WALK, BLEND):
        return None
    return next((time - at for time, _, output in seen.outputs if time > at and output[2] != execution), None)


def _after(moments: Sequence[float], moment: float) -> float | None:
    from bisect import bisect_right

    place = bisect_right(moments, moment)
    return moments[place] if place < len(moments) else None
