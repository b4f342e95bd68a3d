"""``kill -9`` of a worker at full batch: how soon the next token comes, and whether anything was lost or changed."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from ....producer import Handle
from ....protocol.settings import Settings
from ..ground import ENDED, PATIENCE, QUEUE, Ground, ground
from ..models import folder
from ..stage import ReportStage

TASK: Final = "perdure.workers.text.generate"
SEEN: Final = 24
"""Tokens of each request that a client has seen before the worker is killed."""


@dataclass(slots=True)
class Heard:
    """What a client hears of one request, and when."""

    handle: Handle
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    result: Any = None
    error: str = ""

    def listen(self) -> None:
        try:
            for output in self.handle.stream(timeout=PATIENCE):
                self.tokens.append(output["token"])
                self.times.append(time.monotonic())
            self.result = self.handle.result(timeout=PATIENCE)
        except Exception as error:  # told by the verdict; a thread has nobody to raise it to
            self.error = f"{type(error).__name__}: {error}"


def kill(stage: ReportStage) -> None:
    """Beside a spare that has loaded, and beside none: then its place is filled anew, and pays for all of a start."""
    tokens, slots = (800, 4) if stage.rehearsal else (200, 8)
    settings = Settings(
        model=str(folder(stage)),
        device=stage.device,
        dtype="bfloat16",
        slots=slots,
        tasks=(TASK,),
        threads=1 if stage.rehearsal else 0,
    )
    length = {"max_tokens": tokens, "min_tokens": tokens}
    payloads = [
        {"prompt": f"Request {number} outlives its worker.", "seed": number, "temperature": 1.0, **length}
        for number in range(slots)
    ]
    expected: list[Any] = []
    for name, spares in (("beside a warm spare", 1), ("beside none", 0)):
        began = time.monotonic()
        with ground(stage.folder / f"spares-{spares}", settings, spares=spares) as found:
            ready = time.monotonic() - began
            expected = expected or _undisturbed(found, payloads)
            killed, heard = _killed(found, payloads)
            row = _judged(stage, found, name, killed, heard, expected)
            stage.row(name, row | {"first_start_s": ready, "load_s": max(found.loads())})
    stage.note(tokens_of_each_answer=tokens, requests_at_once=slots)


def _undisturbed(found: Ground, payloads: list[dict[str, Any]]) -> list[Any]:
    handles = found.client.submit_many([(TASK, payload) for payload in payloads], queue=QUEUE)
    return [handle.result(timeout=PATIENCE)["token_ids"] for handle in handles]


def _killed(found: Ground, payloads: list[dict[str, Any]]) -> tuple[float, list[Heard]]:
    """Generate, and kill the worker once all of its requests have put out some tokens."""
    handles = found.client.submit_many([(TASK, payload) for payload in payloads], queue=QUEUE)
    heard = [Heard(handle) for handle in handles]
    threads = [threading.Thread(target=item.listen, daemon=True) for item in heard]
    for thread in threads:
        thread.start()
    found.wait("a full batch", lambda: all(len(item.tokens) >= SEEN or item.error for item in heard))
    (worker,) = found.workers()
    at = time.monotonic()
    os.kill(worker["pid"], signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
    return at, heard


def _judged(
    stage: ReportStage, found: Ground, name: str, killed: float, heard: list[Heard], expected: list[Any]
) -> dict[str, Any]:
    delays, interrupted = [], 0
    for item in heard:
        lost = [event for event in found.store.history(item.handle.id) if event.kind == "WORKER_LOST"]
        for event in lost:
            if event.event in ENDED:
                interrupted += 1
                # The token after the last that was stored: nobody can have computed it here but another process.
                delays += [1000 * (item.times[event.offset] - killed)] if event.offset < len(item.times) else []
    answers = [item.result["token_ids"] if item.result else None for item in heard]
    lost_answers = sum(answer is None for answer in answers)
    changed = sum(answer != known for answer, known in zip(answers, expected, strict=True)) - lost_answers
    twice = sum(item.result is not None and item.tokens != item.result["token_ids"] for item in heard)
    stage.expect(f"{name}: all of the batch are interrupted", interrupted == len(heard))
    stage.expect(f"{name}: no answer is lost ({[item.error for item in heard if item.error]})", not lost_answers)
    stage.expect(f"{name}: no answer is changed ({changed} are)", not changed)
    stage.expect(f"{name}: a client sees each token once ({twice} did not)", not twice)
    return {
        "interrupted": interrupted, "next_token_ms": min(delays, default=None),
        "last_ones_next_token_ms": max(delays, default=None), "lost": lost_answers, "changed": changed,
    }  # fmt: skip
