"""Models of transformers as tasks: a tiny GPT-2 with random weights."""

from __future__ import annotations

import runpy
import subprocess
import sys
from typing import Any

import pytest

from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request
from perdure.workers.text.transformers import CausalLM
from tests.kit.lab import Lab, eventually
from tests.kit.places import TASKS

PAYLOAD: dict[str, Any] = {"prompt": "A model of another kind.", "max_tokens": 10, "temperature": 1.0, "seed": 5}
SETTINGS = Settings(device="cpu", threads=1, slots=4)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return runpy.run_path(str(TASKS / "lab_transformers.py"))["gpt2"]


@pytest.fixture(scope="module")
def task(gpt2) -> CausalLM:
    task = CausalLM(gpt2, settings=SETTINGS)
    task.load()
    return task


def run(task: CausalLM, *requests: Request) -> dict[str, tuple[list[Any], Any]]:
    """The outputs and the result of each."""
    for request in requests:
        task.admit(request)
    found: dict[str, tuple[list[Any], Any]] = {request.id: ([], NOTHING) for request in requests}
    while steps := task.step():
        for step in steps:
            assert step.error is None
            outputs, _ = found[step.request_id]
            outputs += [] if step.output is NOTHING else [step.output]
            found[step.request_id] = outputs, step.result
    return found


@pytest.mark.slow
def test_outputs_and_result_are_those_of_text_generation(task):
    """Greedy tokens are those of the package's own generate(); the result says that it is not exact."""
    import torch

    greedy = {"prompt": PAYLOAD["prompt"], "max_tokens": 10, "logprobs": 1}
    outputs, result = run(task, Request(id="a", payload=greedy))["a"]
    ids = torch.tensor([list(PAYLOAD["prompt"].encode())])
    expected = task._loaded()._model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert result["token_ids"] == expected.tolist()
    assert [output["token"] for output in outputs] == result["token_ids"]
    assert "".join(output["text"] for output in outputs) == result["text"]
    assert [entry["logprob"] for entry in result["logprobs"]] == [output["logprob"] for output in outputs]
    assert result["usage"] == {"prompt_tokens": 24, "completion_tokens": 10}
    assert (result["finish_reason"], result["exact"]) == ("length", False)


def test_it_promises_no_equality():
    """A reader compares what a restart puts out again."""
    assert CausalLM.reproducible is False


def test_neighbours_do_not_matter(task):
    """Each request has its own cache and its own passes; a seed draws the same beside others and alone."""
    alone = run(task, Request(id="a", payload=PAYLOAD))["a"]
    others = [Request(id=str(number), payload=PAYLOAD | {"seed": number, "max_tokens": 4}) for number in range(3)]
    assert run(task, Request(id="a", payload=PAYLOAD), *others)["a"] == alone
    assert len({tuple(run(task, request)[request.id][1]["token_ids"]) for request in others}) == 3


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"stop": ["\1\2\3"], "presence_penalty": 1.0}])
def test_a_resume_had_the_same_tokens_at_every_cut(task, fields):
    """An observation on this model and not a promise: last bits differ, and here no token with them."""
    outputs, result = run(task, Request(id="a", payload=PAYLOAD | fields))["a"]
    for cut in range(len(outputs) + 1):
        request = Request(id="b", payload=PAYLOAD | fields, outputs=outputs[:cut])
        assert run(task, request)["b"] == (outputs[cut:], result)


def test_messages_go_through_the_tokenizers_template(task):
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    text = {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "max_tokens": 3}
    assert run(task, Request(id="a", payload=chat))["a"] == run(task, Request(id="a", payload=text))["a"]


@pytest.mark.parametrize("fields", [{"n": 2}, {"exact": True}, {"kv": True}])
def test_what_it_cannot_do_is_refused(task, fields):
    """At submit, but for what the pool alone can tell, and at admission."""
    refusals = [lambda payload: task.admit(Request(id="a", payload=payload))]
    for refuse in refusals if "exact" in fields else [task.prepare, *refusals]:
        with pytest.raises(InvalidRequest) as refused:
            refuse(PAYLOAD | fields)
        assert refused.value.field == next(iter(fields))
    assert task.step() == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"prompt": "a" * 512}, "prompt"), ({"max_tokens": 500}, "max_tokens"), ({"logit_bias": {260: 1}}, "logit_bias")],
)
def test_what_the_model_cannot_take_is_refused(task, fields, field):
    with pytest.raises(InvalidRequest) as refused:
        task.admit(Request(id="a", payload=PAYLOAD | fields))
    assert refused.value.field == field


def test_an_end_token_ends_a_text(gpt2):
    """As the model's configuration names it."""
    task = CausalLM(gpt2, settings=SETTINGS)
    task.load()
    token = run(task, Request(id="a", payload=PAYLOAD))["a"][1]["token_ids"][4]

    def ending() -> tuple[Any, Any]:
        model, encoder = gpt2()
        model.generation_config.eos_token_id = [token]
        return model, encoder

    other = CausalLM(ending, settings=SETTINGS)
    other.load()
    outputs, result = run(other, Request(id="a", payload=PAYLOAD))["a"]
    assert (result["finish_reason"], len(result["token_ids"])) == ("stop", 4)
    for cut in range(len(outputs) + 1):
        request = Request(id="b", payload=PAYLOAD, outputs=outputs[:cut])
        assert run(other, request)["b"] == (outputs[cut:], result)


def test_weights_make_the_fingerprint(gpt2, task):
    """Loaded again it is the same; with one weight changed it is not."""
    again = CausalLM(gpt2, settings=SETTINGS)
    again.load()
    assert again.fingerprint() == task.fingerprint()

    def changed() -> tuple[Any, Any]:
        model, encoder = gpt2()
        next(model.parameters()).data[0, 0] += 1
        return model, encoder

    other = CausalLM(changed, settings=SETTINGS)
    other.load()
    assert other.fingerprint() != task.fingerprint()


def test_slow_tokenizers_are_refused(gpt2):
    """Their tokens cannot be told as bytes."""
    task = CausalLM(lambda: (gpt2()[0], object()), settings=SETTINGS)
    with pytest.raises(SettingsError, match="not a fast tokenizer"):
        task.load()


def test_a_producer_needs_neither_transformers_nor_torch():
    """Importing and preparing do without; loading says what to install."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = sys.modules['transformers'] = None\n"
        "from perdure.protocol.errors import SettingsError\n"
        "from perdure.workers.text.transformers import CausalLM\n"
        "task = CausalLM('anything')\n"
        "assert task.prepare({'prompt': 'a'})['max_tokens'] == 128\n"
        "try:\n    task.load()\n"
        "except SettingsError as error:\n    assert \"pip install 'perdure[transformers]'\" in str(error), error\n"
        "else:\n    raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_killed_worker_is_followed_by_another(lab: Lab, task):
    """kill -9 in the middle: the second worker goes on after the outputs that are stored."""
    payload = task.prepare(PAYLOAD | {"max_tokens": 400})
    # Both at once: most of the time goes into importing.
    workers = [lab.worker(tasks=("lab_transformers.generate",), wait=False) for _ in range(2)]
    eventually(lambda: all(lab.ready(worker.name) for worker in workers), 100)
    identifier = lab.submit("lab_transformers.generate", payload)
    stored = lab.moved(identifier, 5)
    holder = lab.record(identifier).worker
    next(worker for worker in workers if worker.name == holder).kill()
    assert not lab.record(identifier).ended
    record = lab.ended(identifier)
    assert (record.status, record.worker != holder) == ("finished", True)
    outputs = lab.outputs(identifier)
    assert len(outputs) == 400
    # With the last token that is allowed, an unfinished character is let go as well: that one is left out.
    whole = run(task, Request(id="a", payload=payload | {"max_tokens": stored}))["a"][0]
    assert outputs[: stored - 1] == whole[: stored - 1]


def test_a_model_without_keys_computes_all_anew(gpt2):
    """Mamba: slow, and the tokens of its own generate(); a resume goes on with them."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    model = MambaForCausalLM(
        MambaConfig(vocab_size=260, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    )
    task = CausalLM(lambda: (model, gpt2()[1]), settings=SETTINGS)
    task.load()
    greedy = {"prompt": PAYLOAD["prompt"], "max_tokens": 6}
    outputs, result = run(task, Request(id="a", payload=greedy))["a"]
    ids = torch.tensor([list(PAYLOAD["prompt"].encode())])
    with torch.inference_mode():
        for token in result["token_ids"]:
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
    assert run(task, Request(id="b", payload=greedy, outputs=outputs[:3]))["b"] == (outputs[3:], result)
