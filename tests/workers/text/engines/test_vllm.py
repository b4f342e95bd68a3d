"""vLLM in a worker, the real one: what it answers, what it goes on with, what it refuses, and what kills do to it.

Run where vLLM is installed (``scripts/setup engines``); elsewhere nothing of this is collected.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch

from perdure.protocol.errors import InvalidRequest, SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request
from perdure.workers.text import Generate
from perdure.workers.text.engines.vllm.processor import DurableSampler, Tokens
from tests.kit.lab import Lab, eventually, gone, send
from tests.kit.workers.text import write_tiny

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
"""What vLLM's own imports warn of is not ours to mend."""

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
SETTINGS = Settings(model="tiny", device="cpu", threads=1, slots=4, engine="vllm", engine_args=("enforce_eager=true",))
PAYLOAD: dict[str, Any] = {"prompt": "What outlives its process?", "max_tokens": 24, "seed": 7}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 100, "min_p": 0.001},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    "biased": {"logit_bias": {"65": 4, "66": -100}, "min_tokens": 10},
    "stop": {"stop": ["\x01\x02\x03"], "temperature": 1.0},
    "logprobs": {"temperature": 1.0, "logprobs": 3},
    "three": {"n": 3, "temperature": 1.0},
}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "regex": {"regex": "[a-c]{3}-[0-9]{2,6}"},
    "choice": {"choice": ["yes", 'no "really"', "né"]},
    "grammar": {"grammar": 'root ::= "a" root "b" | "x"'},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def task(model: str) -> Any:
    """One engine for all: a process can have one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        task = Generate(SETTINGS.replace(model=model))
        task.load()
        yield task
        assert task._engine is not None
        task._engine.close()


def run(task: Generate, *requests: Request) -> dict[str, tuple[list[Any], Any]]:
    """The new outputs and the result of each."""
    for request in requests:
        task.admit(request)
    found: dict[str, tuple[list[Any], Any]] = {request.id: ([], NOTHING) for request in requests}
    while len(task._loaded()):
        for step in task.step():
            if step.error is not None:
                raise step.error
            outputs, result = found[step.request_id]
            outputs += [] if step.output is NOTHING else [step.output]
            found[step.request_id] = outputs, result if step.result is NOTHING else step.result
    return found


def tokens(outputs: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(output.get("index", 0), output["token"]) for output in outputs]


@pytest.mark.parametrize("way", WAYS)
def test_what_was_put_out_stays_and_is_gone_on_with(task, way):
    """Cut at every token: the new outputs follow the old ones in their order, and the result has both. Tokens are those
    of the undisturbed run, but where the check at load has found other logits, a near tie may fall the other way.
    """
    payload = task.prepare(PAYLOAD | WAYS[way])
    outputs, _ = run(task, Request(id="a", payload=payload))["a"]
    same = 0
    for cut in range(len(outputs) + 1):
        fresh, again = run(task, Request(id="b", payload=payload, outputs=outputs[:cut]))["b"]
        text = "".join(output["text"] for output in [*outputs[:cut], *fresh] if not output.get("index"))
        answer = again["choices"][0] if "choices" in again else again
        assert text == answer["text"]
        assert answer["token_ids"][: cut if way != "three" else 0] == [
            output["token"] for output in outputs[:cut] if way != "three"
        ]
        order = [output.get("index", 0) for output in [*outputs[:cut], *fresh]]
        if way == "three":
            assert order[:9] == [0, 1, 2] * 3
        same += tokens(fresh) == tokens(outputs[cut:])
    assert same >= (len(outputs) + 1) / 2
    assert same == len(outputs) + 1 or not task._loaded().promise.exact


def test_sampling_goes_on_where_vllm_alone_starts_again(task):
    """A sampled answer, cut late, draws the numbers of its places; the first of them again would be other tokens."""
    payload = task.prepare(PAYLOAD | {"temperature": 1.0})
    outputs, _ = run(task, Request(id="a", payload=payload))["a"]
    fresh, _ = run(task, Request(id="b", payload=payload, outputs=outputs[:20]))["b"]
    assert tokens(fresh) == tokens(outputs[20:])


@pytest.fixture(scope="module")
def builtin(model: str) -> Generate:
    builtin = Generate(Settings(model=model, device="cpu", threads=1))
    builtin.load()
    return builtin


def fits(kind: str, text: str, whole: bool) -> bool:
    """Whether an answer has its form, by other means than the grammar; one that was cut off may lack its end."""
    if not whole:
        return True
    if kind == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if kind == "choice":
        return text in FORMS["choice"]["choice"]
    return bool(re.fullmatch(FORMS["regex"]["regex"] if kind == "regex" else "(a*)x(b*)", text))


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_form_is_kept_wherever_an_answer_is_cut(task, builtin, kind, temperature):
    """With vLLM and with the built-in engine: whole, cut at every token, valid each time; the latter's are the same."""
    asked = {"prompt": "Say it.", "max_tokens": 60, "temperature": temperature, "seed": 3}
    for engine in (task, builtin):
        payload = engine.prepare(asked | {"structured_outputs": FORMS[kind]})
        outputs, result = run(engine, Request(id="a", payload=payload))["a"]
        assert fits(kind, result["text"], result["finish_reason"] == "stop"), result
        for cut in range(len(outputs) + 1):
            again = run(engine, Request(id="b", payload=payload, outputs=outputs[:cut]))["b"][1]
            assert fits(kind, again["text"], again["finish_reason"] == "stop"), (cut, again)
            assert engine is task or again == result


def test_no_raw_control_character_stands_in_a_string(task):
    """Rules for the length of a string let them through; ``json.loads`` does not."""
    for schema in ({"type": "string", "minLength": 20}, {"type": "string", "maxLength": 30}):
        for seed in range(5):
            fields = {"max_tokens": 100, "temperature": 1.0, "seed": seed, "structured_outputs": {"json": schema}}
            result = run(task, Request(id="a", payload=PAYLOAD | fields))["a"][1]
            assert result["finish_reason"] == "length" or isinstance(json.loads(result["text"]), str)
            assert not [token for token in result["token_ids"] if token < 0x20]


def test_many_answers_hold_no_neighbour_up(task):
    """Sixteen answers beside a small request, and all of them move with each step."""
    many = PAYLOAD | {"n": 16, "max_tokens": 60, "temperature": 1.0, "logit_bias": {"258": -100}}
    task.admit(Request(id="many", payload=many))
    task.admit(Request(id="small", payload=PAYLOAD | {"max_tokens": 3}))
    ended, indexes = [], []
    for _ in range(8):
        for step in task.step():
            ended += [step.request_id] if step.ends else []
            indexes += [step.output["index"] for step in [step] if step.request_id == "many"]
    assert ended == ["small"]
    assert indexes[:32] == [*range(16), *range(16)]
    task.drop("many")


def test_logprobs_are_those_of_the_built_in_engine(task, builtin):
    """The same function of the model's own logits, which vLLM's CPU kernels compute to some thousandths here."""
    for fields in ({"logprobs": 3}, {"logprobs": True, "temperature": 1.0, "presence_penalty": 1.0}):
        payload = builtin.prepare(PAYLOAD | fields | {"max_tokens": 6})
        mine, theirs = (run(one, Request(id="a", payload=payload))["a"][1]["logprobs"] for one in (builtin, task))
        assert [entry["token"] for entry in mine] == [entry["token"] for entry in theirs]
        assert [entry["logprob"] for entry in mine] == pytest.approx([entry["logprob"] for entry in theirs], abs=0.05)
        assert [len(entry.get("top_logprobs", [])) for entry in mine] == [
            len(entry.get("top_logprobs", [])) for entry in theirs
        ]
    assert not DurableSampler.scores


@pytest.mark.parametrize("model", ["/nonexistent/model", "./nowhere"])
def test_a_folder_that_is_not_there_is_told(model):
    from perdure.workers.text.engines.vllm.loading import start

    with pytest.raises(SettingsError, match="there is no such folder"):
        start(SETTINGS.replace(model=model))


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "nonsense"}},
        {"regex": "(["},
        {"grammar": "root ::= missing"},
        {"grammar": "root ::= root"},
        {"json": {"$ref": "#"}},
    ],
)
def test_a_form_that_is_none_is_told(task, builtin, form):
    for engine in (task, builtin):
        with pytest.raises(InvalidRequest) as refused:
            engine.admit(Request(id="a", payload=PAYLOAD | {"structured_outputs": form}))
        assert refused.value.field == "structured_outputs"
        assert engine.step() == []


def test_outputs_that_have_not_the_form_fail_their_request(builtin):
    """Somebody else's: no token may follow them."""
    outputs = [{"token": 65, "text": "A"}]
    payload = PAYLOAD | {"structured_outputs": FORMS["regex"]}
    builtin.admit(Request(id="a", payload=payload, outputs=outputs))
    steps = [step for _ in range(5) for step in builtin.step()]
    assert isinstance(steps[-1].error, ArithmeticError)


def test_the_sampler_is_the_built_in_engines(task, builtin):
    """The same model in both: the same tokens, but where a tie is near."""
    for fields in (WAYS["sampled"], WAYS["penalties"], WAYS["biased"]):
        payload = builtin.prepare(PAYLOAD | fields)
        mine = run(builtin, Request(id="a", payload=payload))["a"][0]
        theirs = run(task, Request(id="a", payload=payload))["a"][0]
        assert tokens(theirs)[:6] == tokens(mine)[:6]


def test_requests_beside_each_other(task):
    """More than there are slots are refused; those that fit have the answers that they have alone, or nearly all."""
    payloads = [task.prepare(PAYLOAD | {"seed": seed, "temperature": 1.0}) for seed in range(4)]
    alone = [run(task, Request(id="a", payload=payload))["a"][1] for payload in payloads]
    requests = [Request(id=str(place), payload=payload) for place, payload in enumerate(payloads)]
    together = run(task, *requests)
    assert sum(together[str(place)][1] == alone[place] for place in range(4)) >= 3
    for request in requests:
        task.admit(request)
    with pytest.raises(RuntimeError, match="no slot is free"):
        task.admit(Request(id="five", payload=PAYLOAD))
    for request in requests:
        task.drop(request.id)
    task.drop("unknown")
    assert task.step() == []


def test_the_promise_is_measured_and_said(task):
    """How many logits were compared, and the result of one that is not exact."""
    promise = task._loaded().promise
    assert promise.compared >= 64
    assert promise.exact == (promise.different == 0)
    result = run(task, Request(id="a", payload=PAYLOAD))["a"][1]
    assert result.get("exact", True) is promise.exact
    assert task.probe() is True


def test_exactness_that_cannot_be_kept_is_refused(task):
    if task._loaded().promise.exact:
        assert run(task, Request(id="a", payload=PAYLOAD | {"exact": True}))["a"][1]["text"]
        return
    with pytest.raises(InvalidRequest, match="cannot promise it here"):
        task.admit(Request(id="a", payload=PAYLOAD | {"exact": True}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "a" * 1024}, "prompt"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"logit_bias": {"260": 1}}, "logit_bias"),
        ({"kv": True}, "kv"),
    ],
)
def test_what_the_engine_cannot_take_is_its_requests_mistake(task, fields, field):
    with pytest.raises(InvalidRequest) as refused:
        task.admit(Request(id="a", payload=PAYLOAD | fields))
    assert refused.value.field == field
    assert task.step() == []


def test_an_answer_that_has_ended_takes_no_row(task):
    """One of three meets its stop text: vLLM computes it no further."""
    payload = task.prepare(PAYLOAD | {"n": 3, "temperature": 1.0, "max_tokens": 60})
    texts = [answer["text"] for answer in run(task, Request(id="a", payload=payload))["a"][1]["choices"]]
    stop = next(text for text in texts[0][3:20] if text not in texts[1][:40] + texts[2][:40])
    task.admit(Request(id="b", payload=payload | {"stop": [stop]}))
    running = []
    while len(task._loaded()):
        task.step()
        running.append(task._loaded()._engine.get_num_unfinished_requests())
    assert 2 in running[:30]


def test_logits_that_are_no_numbers_fail_their_request_alone():
    """The others of the batch go on."""
    processor = DurableSampler(None, torch.device("cpu"), False)
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from perdure.workers.text.engines.vllm.processor import extra_args
    from perdure.workers.text.parameters import Parameters

    given = Parameters.of({"token_ids": [1], "seed": 1}, "")
    added: list[Any] = [
        (place, SamplingParams(temperature=0, extra_args=extra_args(given, 1, [], f"r{place}")), [1], [])
        for place in range(2)
    ]
    processor.update_state(BatchUpdate(batch_size=2, removed=[], added=added, moved=[]))
    logits = torch.zeros(2, 8)
    logits[0, 3] = torch.nan
    logits[1, 5] = 1
    assert processor.apply(logits).argmax(dim=1)[1] == 5
    assert DurableSampler.unsound == {"r0"}
    DurableSampler.unsound.clear()


def test_rows_follow_the_batch():
    """Removed, added, moved, swapped; requests that are not ours stay as they are."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from perdure.workers.text.engines.vllm.processor import extra_args
    from perdure.workers.text.parameters import Parameters

    def ours(token: int) -> SamplingParams:
        given = Parameters.of({"token_ids": [1], "seed": 1, "logit_bias": {str(token): 100}}, "")
        return SamplingParams(temperature=0, extra_args=extra_args(given, 1, []))

    processor = DurableSampler(None, torch.device("cpu"), False)
    swap, one_way = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    added: list[Any] = [
        (0, ours(1), [1], []),
        (1, SamplingParams(), [1], []),
        (2, ours(2), [1], []),
        (3, ours(3), [1], []),
    ]
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    row = torch.arange(8.0)

    def chosen(count: int) -> list[list[float] | int]:
        found = processor.apply(row.repeat(count, 1))
        return [int(one.argmax()) if one.isinf().any() else one.tolist() for one in found]

    assert chosen(4) == [1, row.tolist(), 2, 3]
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=[], moved=[(0, 1, swap), (2, 3, swap)]))
    assert chosen(4) == [row.tolist(), 1, 3, 2]
    processor.update_state(
        BatchUpdate(batch_size=3, removed=[1], added=[(0, ours(4), [1], [])], moved=[(3, 1, one_way)])
    )
    assert chosen(3) == [4, 2, 3]


def test_the_output_behind_a_prompt_grows():
    live = [7, 8]
    output = Tokens([5, 6], live)
    live.append(9)
    assert (len(output), output[1:4], output[3:], output[4:], output[0]) == (5, [6, 7, 8], [8, 9], [9], 5)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (("speculative_config={}",), "speculative_config cannot be set"),
        (("tensor-parallel-size=2",), "tensor_parallel_size cannot be set"),
        (("max_num_seqs=2",), "PERDURE_SLOTS says it"),
        (("max_model_lenght=5",), "max-model-lenght"),
        (("max_model_len=many",), "max-model-len"),
    ],
)
def test_arguments_of_vllm_are_its_own(entries, said):
    """What it does not know, and what would break the promise, is told in words."""
    from perdure.workers.text.engines.vllm.loading import arguments

    with pytest.raises(SettingsError, match=said):
        arguments(SETTINGS.replace(engine_args=entries))
    taken = arguments(SETTINGS.replace(engine_args=("max_model_len=512", "enforce_eager=true", "seed=3")))
    assert (taken.max_model_len, taken.enforce_eager, taken.seed, taken.max_num_seqs) == (512, True, 3, 64)


def test_the_same_files_have_the_same_meaning(task):
    """On another thread count the arithmetic may be another; what is continued hangs on the meaning alone."""
    engine = task._loaded()
    assert engine.fingerprint() == engine.fingerprint()
    before, engine.promise = engine.promise, type(engine.promise)(exact=False)
    try:
        continued = engine.fingerprint()
        engine._facts["threads"] = 99
        assert engine.fingerprint() == continued
        engine.promise = type(engine.promise)(exact=True)
        assert engine.fingerprint() != continued
    finally:
        engine.promise = before


@pytest.mark.parametrize("when", [1, 3])
def test_a_step_that_raises_leaves_an_engine_that_computes(task, monkeypatch, when):
    """Its requests are dropped, and admitted again they go on; nobody else's keys are in their blocks."""
    payload = task.prepare(PAYLOAD | {"temperature": 1.0})
    outputs, result = run(task, Request(id="a", payload=payload))["a"]
    executor = task._loaded()._engine.engine_core.engine_core.model_executor
    execute, calls = executor.execute_model, []

    def sometimes(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("a kernel")
        return execute(*arguments, **named)

    monkeypatch.setattr(executor, "execute_model", sometimes)
    free = task.memory_free()
    for name, seed in (("x", 7), ("y", 8)):
        task.admit(Request(id=name, payload=payload | {"seed": seed}))
    kept: list[Any] = []
    while len(calls) < when - 1:
        kept += [step.output for step in task.step() if step.request_id == "x" and step.output is not NOTHING]
    with pytest.raises(RuntimeError, match="a kernel"):
        task.step()
    for name in ("x", "y"):
        task.drop(name)
    assert task.probe() is True
    assert task.memory_free() == free
    fresh, again = run(task, Request(id="x", payload=payload, outputs=kept))["x"]
    assert (tokens([*kept, *fresh]), again["text"]) == (tokens(outputs), result["text"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_followed_by_another(lab: Lab, number):
    """In the middle of eight answers: what was stored stays, in order, and nothing of the dead one lives on."""
    settings: dict[str, Any] = {
        "engine": "vllm",
        "model": "tiny",
        "threads": 1,
        "slots": 8,
        "engine_args": ("enforce_eager=true",),
    }
    lab.reaper()
    workers = [
        lab.worker(tasks=("perdure.workers.text.generate",), wait=False, environment=ENVIRONMENT, **settings)
        for _ in range(2)
    ]
    eventually(lambda: all(lab.ready(worker.name) for worker in workers), 110)
    payloads = [
        {"prompt": f"Request {place}", "max_tokens": 600, "seed": place, "temperature": 1.0} for place in range(8)
    ]
    names = [lab.submit("perdure.workers.text.generate", payload) for payload in payloads]
    for name in names:
        lab.moved(name, 5)
    holder = next(worker for worker in workers if worker.name == lab.record(names[0]).worker)
    children = holder.children()
    held = {name: lab.outputs(name) for name in names if lab.record(name).worker == holder.name}
    assert held
    send(holder.pid, number)
    for name in names:
        record = lab.ended(name, 100)
        assert record.status == "finished", lab.events(name)
        outputs = lab.outputs(name)
        assert len(outputs) == 600
        assert outputs[: len(held.get(name, []))] == held.get(name, [])
        result = lab.store.result(name)
        assert "".join(output["text"] for output in outputs) == result["text"]
    assert any(lab.record(name).executions > 1 for name in held)
    eventually(lambda: all(gone(pid) for pid in [holder.pid, *children]))
