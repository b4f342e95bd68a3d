"""docs/text-generation.md says what the code does."""

from __future__ import annotations

import re

import pytest

from perdure.protocol.errors import InvalidRequest
from perdure.workers.text.checks import FIELDS, SOURCES, checked
from perdure.workers.text.engines.transformers import TransformersEngine
from tests.kit.places import DOCS

PAGE = (DOCS / "text-generation.md").read_text(encoding="utf-8")
ROWS = {
    name: (default.strip("` "), limits)
    for name, default, limits in re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*?) ?\| .*\|$", PAGE, re.MULTILINE)
}
BEYOND = {
    "max_tokens": (0,),
    "temperature": (-0.1,),
    "top_p": (0, 1.01),
    "top_k": (-1,),
    "min_p": (-0.1, 1.1),
    "seed": (-1, 2**63),
    "stop": (["a"] * 17, "a" * 257),
    "repetition_penalty": (0,),
    "presence_penalty": (-2.01, 2.01),
    "frequency_penalty": (-2.01, 2.01),
    "logit_bias": ({"1": -101}, {"1": 101}, dict.fromkeys(map(str, range(1025)), 1)),
    "logprobs": (-1, 21),
    "min_tokens": (-1, 129),
    "n": (0, 17),
}
WITHIN = {
    "max_tokens": (1,),
    "temperature": (0, 5),
    "top_p": (1,),
    "top_k": (0,),
    "min_p": (0, 1),
    "seed": (0, 2**63 - 1),
    "stop": (["a"] * 16, "a" * 256),
    "repetition_penalty": (0.1,),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logit_bias": ({"1": -100}, {"1": 100}, dict.fromkeys(map(str, range(1024)), 1)),
    "logprobs": (True, 0, 20),
    "min_tokens": (128,),
    "n": (1, 16),
}


def test_the_table_has_every_field_in_order():
    assert tuple(ROWS) == FIELDS
    assert FIELDS[:3] == SOURCES


@pytest.mark.parametrize("name", FIELDS[3:])
def test_its_defaults_are_those_of_the_code(name):
    """As they are written; two of them are words."""
    value = checked({"prompt": "a"})[name]
    written = ROWS[name][0]
    if written in ("none", "drawn at submit"):
        assert value in (None, [], {})
    else:
        assert written == str(value).lower()


@pytest.mark.parametrize("name", BEYOND)
def test_its_limits_are_those_of_the_code(name):
    """Each number in the column is one that the code knows: a step beyond it is refused."""
    assert re.search(r"\d|`", ROWS[name][1])
    for value in BEYOND[name]:
        with pytest.raises(InvalidRequest) as refused:
            checked({"prompt": "a", name: value})
        assert refused.value.field == name
    for value in WITHIN[name]:
        checked({"prompt": "a", name: value})


def test_the_fields_that_the_adapter_refuses_are_named():
    named = re.search(r"without (`n` and `kv`), which are refused", PAGE)
    assert named
    assert re.findall(r"`(\w+)`", named[1]) == list(TransformersEngine.refused)
