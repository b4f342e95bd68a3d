"""The promise: resumed at any token, alone or in company, the same bits."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from perdure.protocol.codec import pack, unpack
from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request
from perdure.workers.text import Generate
from perdure.workers.text.golden import run_alone
from perdure.workers.text.model.exactness import check_operators, self_check
from perdure.workers.text.model.llama import Llama
from perdure.workers.text.model.operators import Operators
from perdure.workers.text.sampler import choose
from perdure.workers.text.weights.models import read

# Four chunks of prefill, and past the end of an attention bucket while decoding.
PROMPT = "What outlives the process that began it? " * 3
GREEDY = {"prompt": PROMPT[:117], "max_tokens": 20, "seed": 1}
SAMPLED = {"prompt": PROMPT[:117], "max_tokens": 20, "seed": 2, "temperature": 1.0, "top_p": 0.98}
NEIGHBOURS = [
    {"prompt": "short", "max_tokens": 40, "temperature": 2.0, "seed": 11},
    {"prompt": "x" * 200, "max_tokens": 25, "seed": 12},
    {"prompt": "y" * 33, "max_tokens": 7, "temperature": 0.5, "top_k": 9, "seed": 13},
    {"prompt": "z" * 9, "max_tokens": 11, "temperature": 0.8, "seed": 14, "repetition_penalty": 0.8, "logprobs": True},
    {"token_ids": [7, 8, 9] * 30, "max_tokens": 9, "seed": 15, "presence_penalty": -1, "logit_bias": {"65": 1.5}},
]
PENALTIES = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.05,
    "frequency_penalty": 0.11,
    "logit_bias": {"10": -100, "65": 0.4, "66": 0.3},
    "logprobs": 3,
    "min_tokens": 5,
}

ARITHMETIC = list(itertools.product(["float32", "bfloat16"], [1, 2]))


def load(dtype="float32", threads=1, **changes) -> Generate:
    task = Generate(Settings(model="tiny", dtype=dtype, threads=threads, **{"device": "cpu"} | changes))
    task.load()
    return task


@pytest.fixture
def bits(monkeypatch):
    """The logits of every sample, by seed and index; a second, different one is an error."""
    seen: dict[tuple[int, int], bytes] = {}

    def spy(logits, rows):
        for values, row in zip(logits.numpy(), rows, strict=True):
            place = row.parameters.seed, len(row.output)
            previous = seen.setdefault(place, values.tobytes())
            assert previous == values.tobytes(), f"other bits for seed {place[0]} at output {place[1]}"
        return choose(logits, rows)

    monkeypatch.setattr("perdure.workers.text.engines.builtin.batch.choose", spy)
    return seen


def run_together(task: Generate, requests: list[Request]) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Run many, filling each slot as soon as it is free; new outputs and result of each."""
    waiting = list(requests)
    outputs: dict[str, list[Any]] = {item.id: [] for item in requests}
    results: dict[str, dict[str, Any]] = {}
    running: set[str] = set()
    while waiting or running:
        while waiting and len(running) < task.slots:
            item = waiting.pop(0)
            task.admit(item)
            running.add(item.id)
        for step in task.step():
            assert step.error is None
            if step.output is not NOTHING:
                outputs[step.request_id].append(step.output)
            if step.result is not NOTHING:
                results[step.request_id] = step.result
                running.remove(step.request_id)
    return {name: (outputs[name], results[name]) for name in outputs}


def named(payload: dict[str, Any]) -> str:
    kind = "sampled" if "temperature" in payload else "greedy"
    return kind + "-penalised-logprobs" * ("repetition_penalty" in payload)


# Greedy with two threads is among the neighbours: a pass of several threads is slow where others use the cores.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("payload", "dtype", "threads"),
    [(SAMPLED, *case) for case in ARITHMETIC]
    + [(GREEDY, "float32", 1), (GREEDY, "bfloat16", 1)]
    + [(payload | PENALTIES, dtype, 1) for payload in (GREEDY, SAMPLED) for dtype in ("float32", "bfloat16")],
    ids=lambda value: named(value) if isinstance(value, dict) else str(value),
)
def test_resumed_at_every_token_equals_uninterrupted(bits, dtype, threads, payload):
    """Alone, and among neighbours that come and go; to the last bit of every logit."""
    task = load(dtype, threads)
    payload = payload | {"max_tokens": 20 if threads == 1 else 13}
    outputs, result = run_alone(task, Request(id="whole", payload=payload))
    assert len(outputs) == payload["max_tokens"]
    assert ("logprobs" in result) == ("logprob" in outputs[0]) == ("logprobs" in payload)
    resumed = [Request(id=f"resumed-{cut}", payload=payload, outputs=outputs[:cut]) for cut in range(len(outputs) + 1)]
    for cut, request in enumerate(resumed):
        stored = replace(request, outputs=unpack(pack(request.outputs, limit=2**20, what="outputs")))
        assert run_alone(task, stored) == (outputs[cut:], result)
    neighbours = [Request(id=f"other-{place}", payload=item) for place, item in enumerate(NEIGHBOURS)]
    mixed = [item for pair in zip(resumed, neighbours * 9, strict=False) for item in pair]
    unique = [
        Request(id=f"{place}-{item.id}", payload=item.payload, outputs=item.outputs) for place, item in enumerate(mixed)
    ]
    for name, (rest, end) in run_together(task, unique).items():
        if "resumed" in name:
            assert (rest, end) == (outputs[int(name.rpartition("-")[2]) :], result)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("payload", [SAMPLED, SAMPLED | PENALTIES], ids=["plain", "penalised"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_on_a_gpu_equals_uninterrupted(bits, dtype, payload):
    """The same law on the other kind of device."""
    task = load(dtype, device="cuda")
    outputs, result = run_alone(task, Request(id="whole", payload=payload))
    resumed = [Request(id=str(cut), payload=payload, outputs=outputs[:cut]) for cut in range(len(outputs) + 1)]
    for name, found in run_together(task, resumed).items():
        assert found == (outputs[int(name) :], result)


def test_slots_of_any_number_are_exact(bits):
    """Three slots compute in four rows; one request alone in them has the same bits as in company."""
    task = load(slots=3)
    expected = run_alone(task, Request(id="whole", payload=SAMPLED))
    requests = [Request(id=str(place), payload=item) for place, item in enumerate([*NEIGHBOURS, SAMPLED])]
    assert run_together(task, requests)[str(len(NEIGHBOURS))] == expected


class Broken(Operators):
    """One operator that is wrong for one row, in its last bit."""

    def __init__(self, dtype: torch.dtype, which: str) -> None:
        super().__init__(torch.device("cpu"), dtype, 8)
        self._which = which

    def _spoil(self, which: str, x: torch.Tensor) -> torch.Tensor:
        if which == self._which:
            x = x.clone()
            x[5] = torch.nextafter(x[5], x[5] + 1)
        return x

    def linear(self, x, weight):
        return self._spoil("linear", super().linear(x, weight))

    def norm(self, x, weight, epsilon):
        return self._spoil("norm", super().norm(x, weight, epsilon))

    def gate(self, x):
        return self._spoil("gate", super().gate(x))

    def rotate(self, x, cosine, sine):
        return self._spoil("rotate", super().rotate(x, cosine, sine))

    def attend(self, queries, seen, layer):
        return self._spoil("attend", super().attend(queries, seen, layer))


@pytest.mark.parametrize(
    ("which", "named"),
    [
        ("linear", "the product with qkv"),
        ("norm", "norm"),
        ("gate", "gate"),
        ("rotate", "in another slot"),
        ("attend", "in another slot"),
    ],
)
def test_an_operator_that_is_wrong_in_one_row_is_refused(which, named):
    """The self-check can fail: one unit in the last place, in one of eight rows, is enough."""
    bundle = read(Settings(model="tiny"))
    llama = Llama(bundle, torch.device("cpu"), 8, Broken(torch.float32, which))
    with pytest.raises(SettingsError, match=named):
        self_check(llama)


class Forgetful(Operators):
    """Attention that lets the rows of one request in one pass see less of each other than a pass each would."""

    def attend(self, queries, seen, layer):
        first = {id(item.keys): item for item in reversed(seen)}
        return super().attend(queries, [replace(first[id(item.keys)], row=item.row) for item in seen], layer)


def test_a_replay_that_differs_is_refused():
    """Known tokens in one pass must leave what they left one by one."""
    bundle = read(Settings(model="tiny"))
    llama = Llama(bundle, torch.device("cpu"), 4, Forgetful(torch.device("cpu"), torch.float32, 4))
    with pytest.raises(SettingsError, match="a replay"):
        self_check(llama)


@pytest.mark.parametrize(("dtype", "threads"), ARITHMETIC)
@pytest.mark.parametrize("slots", [1, 4, 8, 16])
def test_every_operator_is_slot_invariant_at_the_engines_shapes(dtype, threads, slots):
    """On this machine, for the numbers of rows that engines have."""
    torch.set_num_threads(threads)
    bundle = read(Settings(model="tiny", dtype=dtype))
    check_operators(Llama(bundle, torch.device("cpu"), slots))


def test_the_digest_of_the_bits_is_stable_and_sensitive():
    """Equal in a second engine; another for other arithmetic."""
    torch.set_num_threads(1)
    settings = Settings(model="tiny")
    digests = [self_check(Llama(read(settings), torch.device("cpu"), 8)) for _ in range(2)]
    other = read(settings)
    other.tensors["layers.1.down"][3, 3] += 1e-6
    assert digests[0] == digests[1] != self_check(Llama(other, torch.device("cpu"), 8))


def test_the_fingerprint_tells_what_matters_apart():
    """Dtype, rows, threads; and nothing else does."""
    first = load().fingerprint()
    assert load(trace="", step_timeout=3.0).fingerprint() == first
    others = {load("bfloat16").fingerprint(), load(slots=16).fingerprint(), load(threads=2).fingerprint()}
    assert len(others | {first}) == 4


def test_another_sampler_has_another_fingerprint(monkeypatch):
    """By its version, and by what it computes even where that was forgotten."""
    seen = {load().fingerprint()}
    with monkeypatch.context() as patch:
        patch.setattr("perdure.workers.text.sampler.VERSION", 1_000_000)
        seen.add(load().fingerprint())
    with monkeypatch.context() as patch:
        patch.setattr("perdure.workers.text.sampler.SampledRow.adjust", lambda row, values: values.add_(1.0))
        seen.add(load().fingerprint())
    with monkeypatch.context() as patch:
        patch.setattr("perdure.workers.text.sampler.choose", lambda logits, rows: [0] * len(rows))
        seen.add(load().fingerprint())
    assert len(seen) == 4
    assert load().fingerprint() in seen


def test_the_tiny_model_is_the_same_everywhere():
    """Its weights are made from integers; the digest is of their bytes."""
    bundle = read(Settings(model="tiny"))
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in bundle.tensors.values())).hexdigest()
    assert digest == "a9a01f5170db1bf2464486164e52914c0e24dd4c8b629afc44ecc74cf9b30b91"
    assert bundle.shape.context >= 512
