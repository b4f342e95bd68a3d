"""Limits of text generation: each is checked before the work that it bounds, and concerns its own request only."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
import tokenizers

from perdure.protocol.codec import pack
from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.pool.statuses import UNFIT
from perdure.workers.tasks.base import BatchTask, Request, Step
from perdure.workers.text import Generate
from perdure.workers.text.golden import answer, run_alone
from perdure.workers.text.tokenizer import Tokenizer, Vocabulary
from perdure.workers.text.transformers import CausalLM
from perdure.workers.text.weights.models import read
from tests.kit.places import TASKS
from tests.kit.workers.bench import Turns
from tests.kit.workers.models import TOKENS, weights, write_folder
from tests.kit.workers.text import batch_of

SETTINGS = Settings(model="tiny", device="cpu", threads=1, slots=4)
SIZE = 8 * 1024 * 1024 - 1024

MEASURED = """
import resource, sys, time
from perdure.protocol.errors import InvalidRequest
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import Request
from perdure.workers.text import Generate
kind, unit, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "adapter":
    import runpy
    task = runpy.run_path(sys.argv[4])["generate"]
else:
    task = Generate(Settings(model="tiny", device="cpu", threads=1))
task.load()

def refused(size):
    text = unit * (size // len(unit.encode()))
    payload = {"messages": [{"role": "user", "content": text}]} if kind == "messages" else {"prompt": text}
    began = time.process_time()
    for ask in (lambda: task.memory_needed(payload), lambda: task.admit(Request(id="a", payload=payload))):
        try:
            assert ask() is None and kind == "adapter", "it was taken"
        except InvalidRequest as error:
            assert error.field == ("messages" if kind == "messages" else "prompt"), error
    return time.process_time() - began

small = refused(100_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(refused(size) , small, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loaded(settings: Settings = SETTINGS) -> Generate:
    task = Generate(settings)
    task.load()
    return task


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "unit"), [("prompt", "7"), ("messages", "lorem ipsum "), ("adapter", "日本")])
def test_a_text_far_above_the_context_costs_little(kind: str, unit: str) -> None:
    """8 MiB of it took 14 s and 3 GB, twice. Now: what a small part of it takes, and the memory of a few copies."""
    arguments = [kind, unit, str(SIZE), str(TASKS / "lab_transformers.py")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, small, megabytes = map(float, done.stdout.split())
    assert megabytes < 12 * SIZE / 2**20, "some copies of the text, and nothing for each of its tokens"
    assert seconds < 20 * max(small, 0.05), "80 times as much text"


def test_what_is_only_a_little_too_long_is_counted_exactly() -> None:
    """The number of tokens is told where it costs nothing to know it."""
    with pytest.raises(InvalidRequest, match="prompt has 1024 tokens, but the model's context is 1024"):
        loaded().admit(Request(id="a", payload={"prompt": "a" * 1024}))


def test_a_long_text_of_long_tokens_passes() -> None:
    """Characters are no tokens: one that fits is taken, however many characters it has."""
    word = " " + "a" * 99
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"Ġ": 0, "a": 1}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_tokens([tokenizers.AddedToken(word, normalized=False)])
    tokenizer = Tokenizer(Vocabulary(definition=inner.to_str(), ends=()), 3)
    assert tokenizer.encode(word * 1000, 1024) == [2] * 1000
    with pytest.raises(InvalidRequest, match="the model's context is 400 including the answer"):
        tokenizer.encode(word * 1000, 400)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"token_ids": [7] * 1024}, "token_ids"),
        ({"token_ids": [None] * 1024}, "token_ids"),
        ({"messages": [{"role": "user", "content": ""}] * 1024}, "messages"),
        ({"messages": [None] * 1024}, "messages"),
        ({"prompt": "a" * SIZE, "max_tokens": 1024}, "max_tokens"),
    ],
)
def test_lists_are_counted_before_they_are_looked_through(payload: dict[str, Any], field: str) -> None:
    """By their length alone, for memory and at admission."""
    task = loaded()
    for ask in (task.memory_needed, lambda it: task.admit(Request(id="a", payload=it))):
        with pytest.raises(InvalidRequest, match=r"the model's context is 1024") as refused:
            ask(payload)
        assert refused.value.field == field


@pytest.mark.slow
@pytest.mark.parametrize("logprobs", [None, 5, 20])
@pytest.mark.parametrize("n", [1, 3])
def test_a_result_that_will_be_too_large_is_refused_first(n: int, logprobs: int | None) -> None:
    """The longest that is admitted can be stored, but for its text, and is not much less than what could be."""
    limit = 6000
    task = loaded(SETTINGS.replace(max_payload=limit))

    def asked(tokens: int) -> Request:
        return Request(id="a", payload={"prompt": "x", "n": n, "logprobs": logprobs, "max_tokens": tokens})

    def admitted(tokens: int) -> bool:
        try:
            task.admit(asked(tokens))
        except InvalidRequest:
            return False
        task.drop("a")
        return True

    most = next(tokens for tokens in range(1, 1023) if tokens == 1022 or not admitted(tokens + 1))
    if most < 1022:
        with pytest.raises(InvalidRequest, match="PERDURE_MAX_PAYLOAD") as refused:
            task.admit(asked(most + 1))
        assert refused.value.field == "max_tokens"
    result = run_alone(task, asked(most))[1]
    texts = sum(len(choice["text"].encode()) + 200 for choice in result.get("choices", [result]))
    size = len(pack(result, limit=10**6, what="result"))
    assert size - texts <= limit
    assert most == 1022 or size > 0.6 * limit


def folder_with(tmp_path: Path, **files: Any) -> Path:
    """A model whose tokenizer knows two tokens more than its weights."""
    folder = write_folder(tmp_path / "model", weights(tied=False))
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens([tokenizers.AddedToken("[PAD]", special=False, normalized=False)])
    inner.add_special_tokens([tokenizers.AddedToken("<|tool|>", special=True)])
    inner.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"prompt": "please [PAD] here"}, "prompt"),
        ({"prompt": "<|tool|>"}, "prompt"),
        ({"messages": [{"role": "user", "content": "a [PAD]"}]}, "messages"),
        ({"token_ids": [len(TOKENS)]}, "token_ids"),
        ({"prompt": "a", "logit_bias": {str(len(TOKENS)): 1}}, "logit_bias"),
    ],
)
def test_a_token_without_weights_is_its_request_s_mistake(tmp_path: Path, payload: dict[str, Any], field: str) -> None:
    """Wherever its id comes from. A neighbour's answer stays as it is alone."""
    settings = Settings(model=str(folder_with(tmp_path)), device="cpu", threads=1, slots=4)
    task = loaded(settings)
    good = task.prepare({"prompt": "hello neighbour", "max_tokens": 10})
    alone = answer(good, settings)
    task.admit(Request(id="good", payload=good))
    task.step()
    with pytest.raises(InvalidRequest, match=f"the tokens 0 to {len(TOKENS) - 1}") as refused:
        task.admit(Request(id="bad", payload=payload))
    assert refused.value.field == field
    steps: list[Step] = []
    while not any(step.ends for step in steps):
        steps += task.step()
    assert steps[-1].result == alone


@pytest.mark.slow
def test_the_adapter_refuses_a_token_without_weights_too() -> None:
    def grown() -> tuple[Any, Any]:
        model, encoder = runpy.run_path(str(TASKS / "lab_transformers.py"))["gpt2"]()
        encoder.add_tokens(["[PAD]"])
        return model, encoder

    task = CausalLM(grown, settings=SETTINGS)
    task.load()
    with pytest.raises(InvalidRequest, match="prompt has the token 260, but the model knows the tokens 0 to 259"):
        task.admit(Request(id="a", payload={"prompt": "a [PAD]"}))


@pytest.mark.parametrize("end", [-1, len(TOKENS), 10**9])
def test_an_end_that_the_model_cannot_write_ends_nothing(tmp_path: Path, end: int) -> None:
    """-1 means none in some models; it is not the last token of the vocabulary."""
    folder = folder_with(tmp_path, generation_config={"eos_token_id": [0, end]})
    task = loaded(Settings(model=str(folder), device="cpu", threads=1))
    last = len(TOKENS) - 1
    payload = {"prompt": "a", "max_tokens": 5, "min_tokens": 4, "logit_bias": {str(last): 100}}
    assert run_alone(task, Request(id="a", payload=payload))[1]["token_ids"] == [last] * 5


@pytest.mark.parametrize("ends", ["</s>", 2.0, True])
def test_an_end_that_is_no_token_is_a_model_s_mistake(tmp_path: Path, ends: Any) -> None:
    bundle = read(Settings(model=str(write_folder(tmp_path / "model", weights(tied=False)))))
    values = json.loads(bundle.vocabulary.to_json())
    with pytest.raises(SettingsError, match="no whole number"):
        Tokenizer(Vocabulary.from_json(json.dumps(values | {"ends": [ends]})), len(TOKENS))
    with pytest.raises(SettingsError, match="begins each prompt with 999"):
        Tokenizer(Vocabulary.from_json(json.dumps(values | {"prefix": [1, 999]})), len(TOKENS))


class Cut(Generate):
    """Takes the room for its keys away from requests whose prompt says so: their prefill raises, by itself."""

    def admit(self, request: Request) -> None:
        super().admit(request)
        if request.payload["prompt"].startswith("bad"):
            item = batch_of(self)._requests[request.id]
            assert item.keys is not None
            item.keys = item.keys[:, :, :2]


def cut() -> Cut:
    task = Cut(SETTINGS)
    task.load()
    return task


@pytest.mark.parametrize("fields", [{}, {"exact": False}], ids=["exact", "ordinary"])
def test_what_a_prefill_raises_is_its_own_request_s(fields: dict[str, Any]) -> None:
    """It ends with its error; its neighbour, in the middle of an answer, has the one that it has alone."""
    task, good = cut(), {"prompt": "a neighbour", "max_tokens": 12, "seed": 1, **fields}
    alone = answer(good, SETTINGS)
    task.admit(Request(id="good", payload=good))
    ends: dict[str, Step] = {}
    for number in range(200):
        if number == 3:
            task.admit(Request(id="bad", payload={"prompt": "bad one", "max_tokens": 4, **fields}))
        ends |= {step.request_id: step for step in task.step() if step.ends}
    assert isinstance(ends["bad"].error, RuntimeError)
    assert ends["good"].result == alone


def test_only_the_request_is_charged_whose_prefill_raised(connection: redis.Redis) -> None:
    """In a batch of a real loop: one attempt of that one after the other, none of its neighbours."""
    turns = Turns(connection, cut())
    good = {name: {"prompt": "a neighbour", "max_tokens": 60, "seed": 1} for name in "abc"}
    turns.submit_all({"a": good["a"], "bad": {"prompt": "bad one", "max_tokens": 4}, "b": good["b"], "c": good["c"]})
    turns.run("a", "b", "c")
    for name in good:
        record = turns.record(name)
        assert (record.status, record.attempt, record.executions) == ("finished", 0, 1), turns.reasons(name)
    turns.until(lambda: turns.record("bad").attempt)
    assert turns.reasons("bad")[0][0] == "retry"


def test_an_engine_that_computes_otherwise_is_to_blame(connection: redis.Redis) -> None:
    """Bits of its weights have fallen over, and prefills raise: the worker leaves, and nobody is charged."""
    task = cut()
    turns = Turns(connection, task)  # loads it
    batch_of(task)._llama._norm.mul_(1.5)
    turns.submit_all({name: {"prompt": f"bad {name}", "max_tokens": 4} for name in "abcd"})
    turns.until(lambda: turns.loop.fitness.left, 200)
    assert turns.loop.exit_code == UNFIT
    assert [turns.record(name).attempt for name in "abcd"] == [0] * 4


def test_an_engine_that_computes_as_before_is_not_to_blame(connection: redis.Redis) -> None:
    """Every prefill raises, and nobody healthy is there: each is charged, and the worker stays."""
    turns = Turns(connection, cut())
    turns.submit_all({name: {"prompt": f"bad {name}", "max_tokens": 4} for name in "abcd"})
    turns.until(lambda: all(turns.record(name).attempt for name in "abcd"), 200)
    assert not turns.loop.fitness.left


def test_an_error_that_a_task_found_is_charged_at_once(connection: redis.Redis) -> None:
    """``Step(error=…)`` is the task's own word for whose fault it is, also where nothing proves the engine."""

    class Finds(BatchTask):
        def admit(self, request: Request) -> None:
            self.name = request.id

        def step(self) -> list[Step]:
            return [Step(request_id=self.name, error=ValueError("found"))]

        def drop(self, request_id: str) -> None: ...

    turns = Turns(connection, Finds())
    turns.submit_all({"a": {}})
    turns.until(lambda: turns.record("a").attempt)
    assert turns.loop.exit_code == 0
