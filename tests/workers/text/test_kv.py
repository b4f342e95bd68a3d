"""Keys as a checkpoint: the same bits, nothing computed twice, and never another model's."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import Any

import pytest
import torch

from perdure.protocol.packed_state import pack_state, unpack_state
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request
from perdure.workers.text import Generate
from perdure.workers.text.parameters import complete
from tests.kit.lab import Lab, eventually

SETTINGS = Settings(model="tiny", device="cpu", threads=1)
PROMPT = "A prompt that is long enough is worth more than its keys. " * 3
PAYLOAD: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "temperature": 1.0, "seed": 11, "kv": True}
PER_TOKEN = 3 * 4 * 32 * 4  # layers, heads of keys and values, width, bytes


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A loaded task, and how many positions of a prompt an execution computed."""
    folder = tmp_path_factory.mktemp("trace")
    task = Generate(SETTINGS.replace(trace=str(folder)))
    task.load()

    def prefilled(execution: str) -> int:
        lines = [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
        return Counter((row[1], row[3]) for line in lines for row in line["rows"])[execution, "prefill"]

    return task, prefilled


def through_redis(state: Any) -> Any:
    """As another process would find it."""
    return unpack_state(b"".join(pack_state(state, limit=10**8).stored.pieces))


def run(task: Generate, request: Request) -> tuple[list[Any], list[Any], Any]:
    """The outputs, the states, and the result."""
    task.admit(request)
    outputs, states, result = [], [], NOTHING
    while len(task._engine or ()):
        for step in task.step():
            assert step.error is None
            if step.request_id != request.id:
                continue
            outputs += [] if step.output is NOTHING else [step.output]
            # As the worker does it: before the next step.
            states += [] if step.state is NOTHING else [through_redis(step.state)]
            result = step.result
    return outputs, states, result


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"logprobs": 1}], ids=["plain", "n", "logprobs"])
def test_resumed_equals_uninterrupted_at_every_output(traced, fields):
    """As through Redis; what the state has is not computed again."""
    task, prefilled = traced
    payload = PAYLOAD | fields
    plain = run(task, Request(id="plain", payload={k: v for k, v in payload.items() if k != "kv"}))
    outputs, states, result = run(task, Request(id="a", payload=payload))
    assert plain[1] == []
    assert (outputs, result) == (plain[0], plain[2] | {"kv_tokens": len(PROMPT)})
    state = states[0]
    assert len(states) == 1
    for cut in range(len(outputs) + 1):
        name = f"{'-'.join(fields)}-{cut}"
        request = Request(id="b", execution=name, payload=payload, outputs=outputs[:cut], state=state)
        assert run(task, request) == (outputs[cut:], [], result)
        # The row of the prompt's last token is not stored: without it, its chunk is computed again.
        assert prefilled(name) == (0 if cut >= fields.get("n", 1) else len(PROMPT) % 32)


def test_it_is_the_same_among_neighbours(traced):
    """Three resumed at other places, beside one that begins."""
    task, _ = traced
    outputs, states, result = run(task, Request(id="a", payload=PAYLOAD))
    for cut in range(len(outputs) + 1):
        for number in range(3):
            task.admit(Request(id=str(number), payload=PAYLOAD, outputs=outputs[: number + 1], state=states[0]))
            task.step()
        task.admit(Request(id="new", payload=PAYLOAD | {"seed": 1}))
        assert run(task, Request(id="x", payload=PAYLOAD, outputs=outputs[:cut], state=states[0])) == (
            outputs[cut:],
            [],
            result,
        )


def test_the_state_comes_with_the_first_outputs(traced):
    """In the same step of the engine, so that both are in one checkpoint."""
    task, _ = traced
    task.admit(Request(id="a", payload=PAYLOAD | {"n": 2}))
    steps = task.step()
    while all(step.state is NOTHING for step in steps):
        assert all(step.output is NOTHING for step in steps)
        steps = task.step()
    assert [step.output is NOTHING for step in steps] == [True, False, False]
    task.drop("a")


@pytest.mark.parametrize("kept", [0, 64])
def test_what_does_not_fit_is_computed_again(caplog, kept):
    """Whole chunks as far as the room goes; said in the log and in the result, and the answer is the same."""
    task = Generate(SETTINGS.replace(max_state=1024 + 70 * PER_TOKEN if kept else 1024))
    task.load()
    with caplog.at_level(logging.WARNING, "rq.worker"):
        outputs, states, result = run(task, Request(id="a", payload=PAYLOAD))
    assert f"those of {kept} of its {len(PROMPT)} tokens" in caplog.text
    assert result["kv_tokens"] == kept
    assert len(states) == bool(kept)
    if kept:
        pack_state(states[0], limit=task._settings().max_state)
    state = states[0] if states else None
    for cut in (0, 1, 4):
        rest = run(task, Request(id="b", payload=PAYLOAD, outputs=outputs[:cut], state=state))
        assert (rest[0], rest[2]) == (outputs[cut:], result)


def test_keys_of_another_model_are_never_used(traced, caplog):
    """Nor of another format, shape or length: the prompt is computed, and a sound state written again."""
    task, prefilled = traced
    outputs, states, result = run(task, Request(id="a", payload=PAYLOAD))
    sound = states[0]
    zeros = torch.zeros_like(sound["keys"])
    strange: list[Any] = [
        sound | {"fingerprint": "another", "keys": zeros},
        sound | {"kv": 2, "keys": zeros},
        sound | {"keys": zeros.bfloat16()},
        sound | {"keys": zeros[:2]},
        sound | {"keys": zeros[..., :16]},
        sound | {"keys": torch.zeros(3, 4, 500, 32)},
        sound | {"keys": bytes(100)},
        {"latents": zeros},
        17,
    ]
    for place, state in enumerate(strange):
        name = f"strange-{place}"
        request = Request(id="b", execution=name, payload=PAYLOAD, outputs=outputs[:3], state=state)
        rest, written, again = run(task, request)
        assert (rest, again) == (outputs[3:], result)
        assert [torch.equal(item["keys"], sound["keys"]) for item in written] == [True]
        assert prefilled(name) == len(PROMPT)
    assert caplog.text.count("none for this model") == len(strange)


def test_it_is_asked_for(traced):
    """Without kv a state is neither written nor read, and nothing about it is stored."""
    task, _ = traced
    assert "kv" not in complete(PAYLOAD | {"kv": False})
    assert complete(PAYLOAD)["kv"] is True
    outputs, states, _ = run(task, Request(id="a", payload=PAYLOAD))
    plain = Request(id="b", payload=PAYLOAD | {"kv": False}, outputs=outputs[:2], state=states[0])
    assert run(task, plain)[:2] == (outputs[2:], [])


@pytest.mark.slow
def test_a_killed_worker_leaves_its_keys_to_the_next(lab: Lab, tmp_path):
    """Through Redis, two processes and a kill -9: the second computes no prompt."""
    trace = tmp_path / "trace"
    lab.settings |= {"model": "tiny", "device": "cpu", "threads": 1, "trace": str(trace)}
    payload = complete(PAYLOAD | {"max_tokens": 300, "n": 2})
    workers = [lab.worker(tasks=("perdure.workers.text.generate",), wait=False) for _ in range(2)]
    eventually(lambda: all(lab.ready(worker.name) for worker in workers), 100)
    identifier = lab.submit("perdure.workers.text.generate", payload)
    lab.moved(identifier, 10)
    holder = lab.record(identifier).worker
    first, second = sorted(workers, key=lambda worker: worker.name != holder)
    first.kill()
    assert not lab.record(identifier).ended
    record = lab.ended(identifier)
    assert (record.status, record.worker) == ("finished", second.name)
    lines = [json.loads(line) for line in (trace / f"{second.pid}.jsonl").read_text().splitlines()]
    assert not any(row[3] == "prefill" for line in lines for row in line["rows"])
    task = Generate(SETTINGS)
    task.load()
    assert lab.outputs(identifier) == run(task, Request(id=identifier, payload=payload))[0]
