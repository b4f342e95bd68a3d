"""How requests share the engine: admission, fairness, ends, failures, the trace."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request, Step
from perdure.workers.text import Generate
from perdure.workers.text.golden import answer, answers, run_alone
from perdure.workers.text.model.device import prepare_device
from perdure.workers.text.sampler import choose
from tests.kit.workers.text import batch_of

SETTINGS = Settings(model="tiny", device="cpu", threads=1)
PROMPT = "What outlives its process? " * 2
# fmt: off
RECORDED = [
    [122, 138, 11, 98, 98, 98, 251, 98, 228, 208, 56, 80, 58, 58, 56, 122, 112, 13, 119, 119, 119, 119, 160, 58],
    [155, 57, 230, 144, 60, 57, 225, 38, 174, 118, 174, 18, 238, 21, 184, 199, 58, 73, 98, 229, 163, 118, 161, 156],
]
# fmt: on
PAYLOAD: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "seed": 3}


@pytest.fixture
def task() -> Generate:
    task = Generate(SETTINGS)
    task.load()
    return task


@pytest.fixture
def traced(tmp_path):
    """A loaded task, and what its trace counts: rows by (request, execution, kind)."""
    task = Generate(SETTINGS.replace(trace=str(tmp_path / "trace")))
    task.load()

    def count() -> Counter[tuple[str, str, str]]:
        lines = [json.loads(line) for file in tmp_path.glob("trace/*.jsonl") for line in file.read_text().splitlines()]
        return Counter((row[0], row[1], row[3]) for line in lines for row in line["rows"])

    return task, count


def steps_until(task: Generate, done) -> list[list[Step]]:
    result: list[list[Step]] = []
    while not done([step for steps in result for step in steps]):
        result.append(task.step())
    return result


def ended(*ids: str):
    return lambda steps: set(ids) <= {step.request_id for step in steps if step.ends}


def test_nothing_happens_without_requests(task):
    """An idle engine has no steps, and dropping what it never had is no error."""
    assert task.step() == []
    task.drop("unknown")
    Generate(SETTINGS).drop("before load")


def test_it_must_be_loaded_first():
    """Said plainly."""
    with pytest.raises(RuntimeError, match="load"):
        Generate(SETTINGS).admit(Request(id="a", payload=PAYLOAD))


def test_outputs_and_result_agree(task):
    """Texts add up, tokens are listed, the last step carries output and result together."""
    task.admit(Request(id="a", payload=PAYLOAD))
    steps = [step for steps in steps_until(task, ended("a")) for step in steps]
    outputs = [step.output for step in steps if step.output is not NOTHING]
    result = steps[-1].result
    assert steps[-1].output is not NOTHING
    assert "".join(output["text"] for output in outputs) == result["text"]
    assert [output["token"] for output in outputs] == result["token_ids"]
    assert result["finish_reason"] == "length"
    assert result["usage"] == {"prompt_tokens": len(PAYLOAD["prompt"]), "completion_tokens": 12}
    assert result == answer(PAYLOAD, SETTINGS)


def test_messages_go_through_the_chat_template(task):
    """The model's own; equal to the prompt that it renders to."""
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    text = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "max_tokens": 5}
    results = answers([("a", chat), ("b", text)], SETTINGS)
    assert results[0] == results[1]
    assert results[0]["usage"]["prompt_tokens"] == len("user\nhi\nassistant\n") + 3


def test_token_ids_are_the_prompt_as_they_are():
    """Equal to the prompt that they are the tokens of; every token of the model may be among them."""
    text = PAYLOAD | {"prompt": "What?"}
    ids = {name: value for name, value in PAYLOAD.items() if name != "prompt"} | {"token_ids": list(b"What?")}
    results = answers([("a", text), ("b", ids), ("c", ids | {"token_ids": [0, 259]})], SETTINGS)
    assert results[0] == results[1]
    assert results[2]["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("asked", [True, 0, 2])
def test_outputs_and_result_have_their_logprobs(task, asked):
    """One for each token, the same in both; the tokens are those that come without."""
    plain = answer(PAYLOAD, SETTINGS)
    outputs, result = run_alone(task, Request(id="a", payload=PAYLOAD | {"logprobs": asked}))
    assert {name: value for name, value in result.items() if name != "logprobs"} == plain
    assert result["logprobs"] == [
        {name: value for name, value in output.items() if name != "text"} for output in outputs
    ]
    for output in outputs:
        assert output["logprob"] < 0
        assert ("top_logprobs" in output) == (asked == 2)
        if asked == 2:
            assert len(output["top_logprobs"]) == 2
            assert output["top_logprobs"][0][1] >= output["logprob"]


def test_logprobs_are_the_models_own(task):
    """Neither bias nor temperature changes them; greedily, the chosen token is the likeliest."""
    greedy = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 20}
    first = run_alone(task, Request(id="a", payload=greedy))[0][0]
    assert first["top_logprobs"][0] == [first["token"], first["logprob"]]
    forced = greedy | {"logit_bias": {"65": 100}, "temperature": 0.5, "seed": 4}
    second = run_alone(task, Request(id="b", payload=forced))[0][0]
    assert second["token"] == 65
    assert second["top_logprobs"] == first["top_logprobs"]
    assert second["logprob"] < first["logprob"]


def test_an_answer_has_min_tokens(task):
    """The token that would end it is another one until then; from every cut the same."""
    token = run_alone(task, Request(id="a", payload=PAYLOAD))[1]["token_ids"][3]
    assert task._engine is not None
    task._engine.tokenizer.ends = frozenset({token})
    early = run_alone(task, Request(id="b", payload=PAYLOAD))[1]
    assert (early["finish_reason"], early["usage"]["completion_tokens"]) == ("stop", 3)
    payload = PAYLOAD | {"min_tokens": 8, "logit_bias": {str(token): 30}}
    outputs, result = run_alone(task, Request(id="c", payload=payload))
    assert (result["finish_reason"], result["usage"]["completion_tokens"]) == ("stop", 8)
    for cut in range(len(outputs) + 1):
        rest = run_alone(task, Request(id=str(cut), payload=payload, outputs=outputs[:cut]))
        assert rest == (outputs[cut:], result)


def test_penalties_look_at_the_right_tokens():
    """A bias chooses the tokens; presence counts the output's, repetition the prompt's as well."""
    pair = {"prompt": "A", "max_tokens": 6, "logit_bias": {"65": 40, "66": 39}}
    asked = [
        ("a", pair),
        ("b", pair | {"presence_penalty": 2}),
        ("c", pair | {"repetition_penalty": 2}),
        ("d", pair | {"frequency_penalty": 1}),
        ("e", {"prompt": "A", "max_tokens": 2, "logit_bias": {str(token): -100 for token in range(1, 260)}}),
    ]
    texts = [result["text"] for result in answers(asked, SETTINGS)]
    assert texts[0] == "AAAAAA"
    assert texts[1] == "ABAAAA"
    assert texts[2] == "BAAAAA"
    assert texts[3][:3] in ("ABA", "AAB")
    assert texts[4] == "\0\0"


def test_what_was_asked_before_has_the_answer_it_had_before():
    """Tokens recorded before there were penalties, biases and log-probabilities."""
    asked = [
        ("a", {"prompt": "What outlives the process that began it? ", "max_tokens": 24, "seed": 1}),
        (
            "b",
            {"prompt": "Once upon a time", "max_tokens": 24, "seed": 2, "temperature": 1.0, "top_k": 40, "top_p": 0.98},
        ),
    ]
    results = answers(asked, SETTINGS)
    assert [result["token_ids"] for result in results] == RECORDED
    assert all(set(result) == {"text", "token_ids", "finish_reason", "usage"} for result in results)


@pytest.mark.parametrize(
    ("payload", "field", "numbers"),
    [
        ({"prompt": "a" * 1024}, "prompt", ["1024"]),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, "messages", ["1024"]),
        ({"prompt": "a" * 1000, "max_tokens": 25}, "max_tokens", ["25", "1000", "1024", "24"]),
        ({"token_ids": [1] * 1024}, "token_ids", ["1024"]),
        ({"token_ids": [1, 260]}, "token_ids", ["[1]", "260", "259"]),
        ({"prompt": "a", "logit_bias": {"259": 1, "260": 1}}, "logit_bias", ["260", "259"]),
        ({"prompt": "a", "temprature": 1}, "temprature", []),
    ],
)
def test_what_the_model_cannot_take_is_refused_beside_others(task, payload, field, numbers):
    """The one that is refused is named and counted; the one that runs does not notice."""
    task.admit(Request(id="a", payload=PAYLOAD))
    task.step()
    with pytest.raises(InvalidRequest) as refused:
        task.admit(Request(id="b", payload=payload))
    assert refused.value.field == field
    assert all(number in str(refused.value) for number in numbers)
    steps = steps_until(task, ended("a"))
    assert steps[-1][0].result == answer(PAYLOAD, SETTINGS)


def test_the_context_can_be_used_to_its_last_token(task):
    """1020 tokens of prompt and 4 of answer fill 1024."""
    outputs, result = run_alone(task, Request(id="a", payload={"prompt": "a" * 1020, "max_tokens": 4}))
    assert len(outputs) == 4
    assert result["usage"]["prompt_tokens"] == 1020


def test_no_more_than_the_slots_and_no_request_twice(task):
    """Both are mistakes of the caller, and touch nobody."""
    for place in range(8):
        task.admit(Request(id=str(place), payload=PAYLOAD))
    with pytest.raises(RuntimeError, match="slot"):
        task.admit(Request(id="8", payload=PAYLOAD))
    with pytest.raises(RuntimeError, match="already"):
        task.admit(Request(id="3", payload=PAYLOAD))
    task.drop("3")
    task.admit(Request(id="8", payload=PAYLOAD))
    done = {step.request_id for steps in steps_until(task, ended("8", "0", "7")) for step in steps if step.ends}
    assert done == set("01245678")


def test_outputs_of_another_task_are_refused(task):
    """A checkpoint that is not ours is not guessed at."""
    wrong: list[list[Any]] = [[3], [{"token": "a"}], [{"token": 10**6}], [{}]]
    for outputs in wrong:
        with pytest.raises(ValueError, match="output 0"):
            task.admit(Request(id="a", payload=PAYLOAD, outputs=outputs))
    for extra in (
        {},
        {"logprob": None, "top_logprobs": [[1, -1.0]]},
        {"logprob": -1.0},
        {"logprob": -1.0, "top_logprobs": []},
        {"logprob": -1.0, "top_logprobs": [[1, -1.0], [2, -2.0]]},
        {"logprob": -1.0, "top_logprobs": [[260, -1.0]]},
        {"logprob": -1.0, "top_logprobs": [[1, "x"]]},
        {"logprob": -1.0, "top_logprobs": [1]},
    ):
        output = {"token": 1, "text": "", **extra}
        with pytest.raises(ValueError, match="output 0"):
            task.admit(Request(id="a", payload=PAYLOAD | {"logprobs": 1}, outputs=[output]))
    assert task.step() == []


@pytest.mark.parametrize(("prompt", "passes"), [(900, ".a" * 7 + "."), (127, "..a.."), (3 * 128 + 33, ".a.a.a..")])
def test_a_long_prompt_does_not_stop_the_others(task, prompt, passes):
    """Between two outputs of a running request there is at most one pass of a block, or two of chunks."""
    task.admit(Request(id="a", payload={"prompt": "a", "max_tokens": 40}))
    task.step()
    task.step()
    task.admit(Request(id="long", payload={"prompt": "b" * prompt, "max_tokens": 1}))
    moved = [{step.request_id for step in steps} for steps in steps_until(task, ended("long"))]
    waits = "".join("a" if "a" in names else "." for names in moved)
    assert waits.startswith(passes)


def test_a_prompt_is_cut_by_its_length_alone(task):
    """Blocks as long as it fills them, then chunks, in one piece after the other; a resume finds the same cuts."""
    llama = batch_of(task)._llama
    for prompt in (1, 31, 32, 127, 128, 129, 160, 300, 512):
        cuts, place = [], 0
        while place < prompt:
            start, end = llama.chunk_at(place, prompt)
            assert start == place
            assert all(llama.chunk_at(inside, prompt) == (start, end) for inside in range(start, end))
            cuts.append(end - start)
            place = end
        blocks, rest = divmod(prompt, 128)
        assert cuts == [128] * blocks + [32] * (rest // 32) + ([rest % 32] if rest % 32 else [])


def test_one_failure_of_arithmetic_leaves_the_others(task, monkeypatch):
    """A row that is no numbers ends its request, with the error, and no other."""

    def sometimes(logits, rows):
        bad = [row.parameters.seed == 99 and len(row.output) == 4 for row in rows]
        return [-1 if one else token for one, token in zip(bad, choose(logits, rows), strict=True)]

    expected = answer(PAYLOAD, SETTINGS)
    monkeypatch.setattr("perdure.workers.text.engines.builtin.batch.choose", sometimes)
    task.admit(Request(id="a", payload=PAYLOAD))
    task.admit(Request(id="bad", payload=PAYLOAD | {"seed": 99}))
    steps = [step for steps in steps_until(task, ended("a", "bad")) for step in steps if step.ends]
    ends = {step.request_id: step for step in steps}
    assert isinstance(ends["bad"].error, ArithmeticError)
    assert ends["a"].result == expected


def stopped_by(task: Generate, kind: str, **fields: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """A payload that ends in this way, its outputs, and its result."""
    asked = PAYLOAD | fields
    outputs, result = run_alone(task, Request(id=kind, payload=asked))
    if kind == "length":
        return asked, outputs, result
    if kind == "stop":
        text = result["text"]
        payload = asked | {"stop": [text[5:7]]}
    else:
        # The ninth token becomes one that ends a text; with a stop string, text is held back until then.
        assert task._engine is not None
        task._engine.tokenizer.ends = frozenset({result["token_ids"][8]})
        before = outputs[7]["text"] or outputs[6]["text"]
        payload = asked | ({"stop": [before[-1] + "never"]} if kind == "held" else {})
    return payload, *run_alone(task, Request(id=kind, payload=payload))


@pytest.mark.parametrize("kind", ["length", "stop", "end", "held"])
def test_a_request_with_all_its_outputs_ends_at_once(traced, kind):
    """Its last execution died between the last output and the result: no pass, no further token."""
    task, count = traced
    payload, outputs, result = stopped_by(task, kind)
    before = count()
    again, repeated = run_alone(task, Request(id=kind, execution="second", payload=payload, outputs=outputs))
    assert (again, repeated) == ([], result)
    extra = count() - before
    # A token that ends the text without an output was not stored, and is sampled again.
    assert sum(number for key, number in extra.items() if key[2] == "decode") == (kind == "end")
    assert bool(extra) == (kind == "end")


@pytest.mark.parametrize("fields", [{}, {"logprobs": 1, "repetition_penalty": 1.1}], ids=["plain", "logprobs"])
@pytest.mark.parametrize("kind", ["length", "stop", "end", "held"])
def test_each_way_to_end_is_the_same_from_every_cut(task, kind, fields):
    """Stop strings and held back text do not depend on where an execution began."""
    payload, outputs, result = stopped_by(task, kind, **fields)
    if fields:
        assert [entry["token"] for entry in result["logprobs"]] == result["token_ids"]
        assert all("logprob" in output for output in outputs)
    assert "".join(output["text"] for output in outputs) == result["text"]
    assert len(result["token_ids"]) == len(outputs) - (kind == "held")
    assert result["finish_reason"] == ("length" if kind == "length" else "stop")
    for cut in range(len(outputs) + 1):
        rest = run_alone(task, Request(id=str(cut), payload=payload, outputs=outputs[:cut]))
        assert rest == (outputs[cut:], result)


def test_the_trace_counts_every_row(traced):
    """Decode rows are the tokens sampled, over all executions; a resumed one replays and samples the rest."""
    task, count = traced
    prompt = len(PAYLOAD["prompt"])
    outputs, _ = run_alone(task, Request(id="a", execution="first", payload=PAYLOAD))
    assert count() == {("a", "first", "prefill"): prompt, ("a", "first", "decode"): 12}
    run_alone(task, Request(id="a", execution="second", payload=PAYLOAD, outputs=outputs[:9]))
    rows = count()
    assert rows["a", "second", "prefill"] == prompt
    assert rows["a", "second", "replay"] == 8
    assert rows["a", "second", "decode"] == 3


def test_replay_takes_a_pass_for_every_eight_tokens(task):
    """Many known tokens are one pass, not one each."""
    payload = PAYLOAD | {"max_tokens": 60, "prompt": "a"}
    outputs, _ = run_alone(task, Request(id="a", payload=payload))
    task.admit(Request(id="b", payload=payload, outputs=outputs[:32]))
    steps = steps_until(task, lambda steps: any(step.output is not NOTHING for step in steps))
    assert len(steps) == 1 + 4


def test_cuda_without_cuda_is_an_error(monkeypatch):
    """Never a silent CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("cuda", "cuda:3"):
        with pytest.raises(SettingsError, match=r"^CUDA_UNAVAILABLE: PERDURE_DEVICE=cuda"):
            prepare_device(Settings(device=name))
    with pytest.raises(SettingsError, match="auto, cpu, cuda"):
        prepare_device(Settings(device="gpu"))
    assert prepare_device(Settings(device="auto")).type == "cpu"


def test_slots_come_from_the_settings():
    """Without loading anything."""
    assert Generate(Settings(slots=3)).slots == 3


def test_arguments_of_another_engine_are_refused():
    """Whoever forgot to name it would believe that they count."""
    with pytest.raises(SettingsError, match="the engine builtin takes no arguments"):
        Generate(SETTINGS.replace(engine_args=("max_model_len=5",))).load()


@pytest.mark.parametrize(("name", "said"), [("vlm", "must be one of"), ("vllm", r"perdure\[vllm\]")])
def test_an_engine_that_is_not_there_is_told(monkeypatch, name, said):
    monkeypatch.setattr("perdure.workers.text.find_spec", lambda package: None)
    with pytest.raises(SettingsError, match=said):
        Generate(SETTINGS.replace(engine=name)).load()
