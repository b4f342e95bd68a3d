"""The real model: known answers, and resumption in float32."""

from __future__ import annotations

import os
from typing import Any

import pytest

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import NOTHING, Request
from perdure.workers.text import Generate
from perdure.workers.text.golden import run_alone
from perdure.workers.text.weights.models import read
from tests.kit.places import ROOT

CHAT = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 12,
    "seed": 1,
}
SAMPLED = {"prompt": "Once upon a time, in a house of 2 rooms,", "max_tokens": 14, "temperature": 0.8, "seed": 2}


@pytest.fixture(scope="module")
def settings() -> Settings:
    """Settings that find the weights; without them CI fails, and everybody else skips."""
    folder = os.environ.get("PERDURE_MODEL_PATH") or str(ROOT / ".models")
    result = Settings(model="smollm2", model_path=folder, device="cpu", threads=1)
    try:
        read(result)
    except SettingsError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    return result


@pytest.fixture(scope="module")
def task(settings: Settings) -> Generate:
    task = Generate(settings)
    task.load()
    return task


@pytest.mark.slow
def test_it_answers(task):
    """Weights, tokenizer and chat template belong together; the reader would notice otherwise."""
    _, result = run_alone(task, Request(id="a", payload=CHAT))
    assert "Paris" in result["text"]


def test_its_tokens_are_the_published_ones(task):
    """Ids of this model's tokenizer: digits one by one, blanks with the word, special tokens whole."""
    tokenizer = task._engine.tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("Hello world 123") == HELLO
    chat = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1
    assert b"".join(tokenizer.pieces[token] for token in chat).decode() == (
        "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\nuser\nHi\nassistant\n"
    )
    for text in ("naïve café 東京 🙂\n\n\tx", "don't  we'll\r\n", "<|im_end|>!"):
        pieces = b"".join(tokenizer.pieces[token] for token in tokenizer.encode(text))
        assert pieces.decode() == text.replace("<|im_end|>", "")


HELLO = [19556, 905, 216, 33, 34, 35]


@pytest.mark.slow
def test_resumed_equals_uninterrupted_in_company(task):
    """At the first token, in the middle and at the last one, four at a time."""
    for payload in (CHAT, SAMPLED):
        outputs, result = run_alone(task, Request(id="whole", payload=payload))
        cuts = (0, 1, len(outputs) // 2, len(outputs) - 1)
        for cut in cuts:
            task.admit(Request(id=str(cut), payload=payload, outputs=outputs[:cut]))
        found = {str(cut): list(outputs[:cut]) for cut in cuts}
        ends: dict[str, Any] = {}
        while len(ends) < len(cuts):
            for step in task.step():
                assert step.error is None
                if step.output is not NOTHING:
                    found[step.request_id].append(step.output)
                if step.result is not NOTHING:
                    ends[step.request_id] = step.result
        assert all(rows == outputs for rows in found.values())
        assert all(end == result for end in ends.values())
