"""What a generation may be asked to do, and what is refused, without a model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from perdure.protocol.errors import InvalidRequest
from perdure.protocol.tasks import path_of, resolve
from perdure.workers.text import Generate, generate
from perdure.workers.text.parameters import Parameters

BAD = [
    ("no mapping", "hello", ""),
    ("nothing", {}, "prompt"),
    ("unknown field", {"prompt": "a", "temprature": 1.0}, "temprature"),
    ("field that is no string", {"prompt": "a", 3: 1}, "3"),
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("prompt of another type", {"prompt": ["a"]}, "prompt"),
    ("half a surrogate pair", {"prompt": "\ud800"}, "prompt"),
    ("prompt and messages", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
    ("prompt and token_ids", {"prompt": "a", "token_ids": [1]}, "prompt"),
    ("messages and token_ids", {"messages": [{"role": "user", "content": "a"}], "token_ids": [1]}, "messages"),
    ("no token_ids", {"token_ids": []}, "token_ids"),
    ("token_ids a string", {"token_ids": "12"}, "token_ids"),
    ("token_ids bytes", {"token_ids": b"12"}, "token_ids"),
    ("token_ids with a string", {"token_ids": [1, "2"]}, "token_ids"),
    ("token_ids with a float", {"token_ids": [1.0]}, "token_ids"),
    ("token_ids with a bool", {"token_ids": [True]}, "token_ids"),
    ("token_ids with nothing", {"token_ids": [None]}, "token_ids"),
    ("token_ids negative", {"token_ids": [3, -1]}, "token_ids"),
    ("token_ids huge", {"token_ids": [2**31]}, "token_ids"),
    ("exact a number", {"prompt": "a", "exact": 0}, "exact"),
    ("exact a string", {"prompt": "a", "exact": "no"}, "exact"),
    ("kv a number", {"prompt": "a", "kv": 1}, "kv"),
    ("no messages", {"messages": []}, "messages"),
    ("n 0", {"prompt": "a", "n": 0}, "n"),
    ("n negative", {"prompt": "a", "n": -1}, "n"),
    ("n beyond its limit", {"prompt": "a", "n": 17}, "n"),
    ("n a float", {"prompt": "a", "n": 2.0}, "n"),
    ("n a bool", {"prompt": "a", "n": True}, "n"),
    ("n a string", {"prompt": "a", "n": "2"}, "n"),
    ("messages of another type", {"messages": "a"}, "messages"),
    ("message of another type", {"messages": ["a"]}, "messages"),
    ("message without content", {"messages": [{"role": "user"}]}, "messages"),
    ("message of no mapping", {"messages": [["user", "a"]]}, "messages"),
    ("unknown role", {"messages": [{"role": "usr", "content": "a"}]}, "messages"),
    ("max_tokens 0", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("max_tokens a float", {"prompt": "a", "max_tokens": 3.0}, "max_tokens"),
    ("max_tokens a bool", {"prompt": "a", "max_tokens": True}, "max_tokens"),
    ("max_tokens huge", {"prompt": "a", "max_tokens": 2**40}, "max_tokens"),
    ("temperature NaN", {"prompt": "a", "temperature": float("nan")}, "temperature"),
    ("temperature infinite", {"prompt": "a", "temperature": float("inf")}, "temperature"),
    ("temperature beyond floats", {"prompt": "a", "temperature": 10**400}, "temperature"),
    ("temperature negative", {"prompt": "a", "temperature": -0.1}, "temperature"),
    ("temperature a string", {"prompt": "a", "temperature": "1"}, "temperature"),
    ("temperature a bool", {"prompt": "a", "temperature": True}, "temperature"),
    ("top_p 0", {"prompt": "a", "top_p": 0}, "top_p"),
    ("top_p above 1", {"prompt": "a", "top_p": 1.1}, "top_p"),
    ("top_p NaN", {"prompt": "a", "top_p": float("nan")}, "top_p"),
    ("top_k negative", {"prompt": "a", "top_k": -1}, "top_k"),
    ("top_k a float", {"prompt": "a", "top_k": 1.5}, "top_k"),
    ("seed negative", {"prompt": "a", "seed": -1}, "seed"),
    ("seed beyond 63 bits", {"prompt": "a", "seed": 2**63}, "seed"),
    ("seed a bool", {"prompt": "a", "seed": False}, "seed"),
    ("stop a number", {"prompt": "a", "stop": 1}, "stop"),
    ("stop empty", {"prompt": "a", "stop": ""}, "stop"),
    ("stop with an empty one", {"prompt": "a", "stop": ["a", ""]}, "stop"),
    ("stop with a number", {"prompt": "a", "stop": ["a", 1]}, "stop"),
    ("too many stops", {"prompt": "a", "stop": ["a"] * 17}, "stop"),
    ("repetition_penalty 0", {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ("repetition_penalty negative", {"prompt": "a", "repetition_penalty": -1.0}, "repetition_penalty"),
    ("repetition_penalty NaN", {"prompt": "a", "repetition_penalty": float("nan")}, "repetition_penalty"),
    ("repetition_penalty infinite", {"prompt": "a", "repetition_penalty": float("inf")}, "repetition_penalty"),
    ("repetition_penalty a string", {"prompt": "a", "repetition_penalty": "1.1"}, "repetition_penalty"),
    ("repetition_penalty a bool", {"prompt": "a", "repetition_penalty": True}, "repetition_penalty"),
    ("presence_penalty above 2", {"prompt": "a", "presence_penalty": 2.01}, "presence_penalty"),
    ("presence_penalty below -2", {"prompt": "a", "presence_penalty": -2.01}, "presence_penalty"),
    ("presence_penalty NaN", {"prompt": "a", "presence_penalty": float("nan")}, "presence_penalty"),
    ("frequency_penalty above 2", {"prompt": "a", "frequency_penalty": 3}, "frequency_penalty"),
    ("frequency_penalty infinite", {"prompt": "a", "frequency_penalty": float("-inf")}, "frequency_penalty"),
    ("frequency_penalty a list", {"prompt": "a", "frequency_penalty": [1]}, "frequency_penalty"),
    ("logit_bias a list", {"prompt": "a", "logit_bias": [[1, 2]]}, "logit_bias"),
    ("logit_bias false", {"prompt": "a", "logit_bias": False}, "logit_bias"),
    ("logit_bias too long", {"prompt": "a", "logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias"),
    ("logit_bias of a word", {"prompt": "a", "logit_bias": {"the": 1}}, "logit_bias"),
    ("logit_bias of a negative token", {"prompt": "a", "logit_bias": {-1: 1}}, "logit_bias"),
    ("logit_bias of a negative string", {"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
    ("logit_bias of a huge token", {"prompt": "a", "logit_bias": {2**31: 1}}, "logit_bias"),
    ("logit_bias of a long string", {"prompt": "a", "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ("logit_bias with leading zeros", {"prompt": "a", "logit_bias": {"01": 1}}, "logit_bias"),
    ("logit_bias with other digits", {"prompt": "a", "logit_bias": {"١": 1}}, "logit_bias"),
    ("logit_bias with a line's end", {"prompt": "a", "logit_bias": {"1\n": 1}}, "logit_bias"),
    ("logit_bias of a float", {"prompt": "a", "logit_bias": {1.0: 1}}, "logit_bias"),
    ("logit_bias of a bool", {"prompt": "a", "logit_bias": {True: 1}}, "logit_bias"),
    ("logit_bias of one token twice", {"prompt": "a", "logit_bias": {1: 1, "1": 2}}, "logit_bias"),
    ("logit_bias above 100", {"prompt": "a", "logit_bias": {1: 100.5}}, "logit_bias"),
    ("logit_bias NaN", {"prompt": "a", "logit_bias": {1: float("nan")}}, "logit_bias"),
    ("logit_bias beyond floats", {"prompt": "a", "logit_bias": {1: 10**400}}, "logit_bias"),
    ("logit_bias a string", {"prompt": "a", "logit_bias": {1: "5"}}, "logit_bias"),
    ("logit_bias a bool", {"prompt": "a", "logit_bias": {1: True}}, "logit_bias"),
    ("logprobs above 20", {"prompt": "a", "logprobs": 21}, "logprobs"),
    ("logprobs negative", {"prompt": "a", "logprobs": -1}, "logprobs"),
    ("logprobs a float", {"prompt": "a", "logprobs": 5.0}, "logprobs"),
    ("logprobs a string", {"prompt": "a", "logprobs": "true"}, "logprobs"),
    ("logprobs a list", {"prompt": "a", "logprobs": []}, "logprobs"),
    ("min_tokens negative", {"prompt": "a", "min_tokens": -1}, "min_tokens"),
    ("min_tokens a bool", {"prompt": "a", "min_tokens": True}, "min_tokens"),
    ("min_tokens a float", {"prompt": "a", "min_tokens": 2.0}, "min_tokens"),
    ("min_tokens above max_tokens", {"prompt": "a", "min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ("min_tokens above the default", {"prompt": "a", "min_tokens": 129}, "min_tokens"),
    ("stop too long", {"prompt": "a", "stop": "a" * 257}, "stop"),
]


@pytest.mark.parametrize(("payload", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_payload_is_refused_with_its_field(payload, field):
    """Both at submit and at admission."""
    with pytest.raises(InvalidRequest) as refused:
        generate.prepare(payload)
    assert refused.value.field == field
    with pytest.raises(InvalidRequest) as refused:
        Parameters.of(payload, "request")
    assert refused.value.field == field


def test_a_misspelt_field_is_answered_with_the_nearest_one():
    """The message helps."""
    for name, meant in (
        ("temprature", "temperature"),
        ("token_id", "token_ids"),
        ("repetition_penality", "repetition_penalty"),
        ("presense_penalty", "presence_penalty"),
        ("logitbias", "logit_bias"),
        ("logprob", "logprobs"),
    ):
        with pytest.raises(InvalidRequest, match=rf"did you mean {meant}\?$"):
            generate.prepare({"prompt": "a", name: 1.0})


def test_prepare_fills_in_the_defaults_and_draws_a_seed():
    """What is stored does not depend on a later release's defaults."""
    first, second = (generate.prepare({"prompt": "a", "stop": "b", "seed": None}) for _ in range(2))
    assert first.pop("seed") != second.pop("seed")
    assert first == {
        "prompt": "a",
        "max_tokens": 128,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop": ["b"],
    }
    assert generate.prepare({"prompt": "a", "seed": 5})["seed"] == 5


def test_what_prepare_stores_it_takes_again_unchanged():
    """A payload may pass twice, at submit and at resubmit."""
    for payload in ({"messages": [{"role": "user", "content": "a"}], "temperature": 1}, {"token_ids": (1, 2)}):
        stored = generate.prepare(payload)
        assert generate.prepare(stored) == stored


def test_what_changes_nothing_is_not_stored():
    """A worker of before takes such a request, and the same body stays the same body."""
    off = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": -0.0, "logit_bias": {}}
    off |= {"logprobs": False, "min_tokens": 0}
    plain = generate.prepare({"prompt": "a", "seed": 1})
    assert generate.prepare({"prompt": "a", "seed": 1, **off}) == plain
    assert generate.prepare({"prompt": "a", "seed": 1, **dict.fromkeys(off)}) == plain
    assert Parameters.of(plain, "a") == Parameters.of({"prompt": "a", "seed": 1, **off}, "a")


def test_penalties_and_biases_are_stored_in_one_form():
    """Keys are strings, by token; and what is stored is taken again unchanged."""
    given = {
        "prompt": "a",
        "seed": 1,
        "repetition_penalty": 2,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "logit_bias": {10: 100, "9": -100, 2**31 - 1: 0.5},
    }
    stored = generate.prepare(given)
    assert list(stored["logit_bias"].items()) == [("9", -100.0), ("10", 100.0), ("2147483647", 0.5)]
    assert generate.prepare(stored) == stored
    parameters = Parameters.of(stored, "a")
    assert parameters == Parameters.of(given, "a")
    assert parameters.logit_bias == ((9, -100.0), (10, 100.0), (2**31 - 1, 0.5))
    assert (parameters.repetition_penalty, parameters.presence_penalty, parameters.frequency_penalty) == (2, -2, 2)


def test_logprobs_are_a_number_or_off():
    """True is the chosen token's alone; 0 is not off."""
    for given, meant in ((False, None), (None, None), (True, 0), (0, 0), (1, 1), (20, 20)):
        stored = generate.prepare({"prompt": "a", "seed": 1, "logprobs": given})
        assert generate.prepare(stored) == stored
        assert stored.get("logprobs") == meant
        assert Parameters.of(stored, "a").logprobs == meant
        assert not isinstance(Parameters.of(stored, "a").logprobs, bool)


def test_a_request_without_a_seed_takes_it_from_its_id():
    """Each execution draws the same; each request draws another."""
    seeds = [Parameters.of({"prompt": "a"}, name).seed for name in ("one", "one", "two")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_task_has_a_dotted_path():
    """As the documentation spells it."""
    assert resolve("perdure.workers.text.generate") is generate
    assert path_of(generate) == "perdure.workers.text.generate"
    assert isinstance(generate, Generate)


def test_a_producer_needs_no_torch():
    """Importing, checking a payload and asking for the slots import neither torch nor numpy."""
    code = (
        "import sys; from perdure.workers.text import generate; generate.prepare({'prompt': 'a'}); generate.slots; "
        "sys.exit(len({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
