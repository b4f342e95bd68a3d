"""A batch of text generation: its answers are those of direct submits, and the page about it says what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.producer import Client
from perdure.protocol.settings import Settings
from perdure.scripts.batch import bodies as batch_bodies
from perdure.scripts.pool.server import Server
from tests.kit.docs.pages import blocks
from tests.kit.lab import LONG, Lab, laboratory
from tests.kit.places import DOCS
from tests.kit.scripts.batch import PERDURE, Job

PAGE = DOCS / "batch.md"


@pytest.fixture(scope="module")
def lab(server_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One worker with the small model."""
    pytest.importorskip("torch")
    with (
        Server(binary=server_binary, die_with_parent=True) as server,
        laboratory(server.url, tmp_path_factory.mktemp("text")) as lab,
    ):
        lab.settings |= {"model": "tiny", "device": "cpu", "threads": 1, "slots": 4}
        lab.settings |= {"step_timeout": 60.0, "tasks": (batch_bodies.GENERATE,)}
        lab.worker()
        yield lab


@pytest.mark.slow
def test_the_answers_are_those_of_direct_submits(lab: Lab, tmp_path: Path) -> None:
    """With a real model: completions and chats, sampled and greedy, one and several, are what the client gets."""
    sampled = {"temperature": 0.9, "seed": 5, "max_tokens": 6}
    chat = [{"role": "user", "content": "Who?"}]
    bodies = {
        "greedy": ("/v1/completions", {"model": "tiny", "prompt": "Beautiful is", "max_tokens": 8}),
        "sampled": ("/v1/completions", {"prompt": ["Now is"], "n": 2, "logprobs": 1, **sampled}),
        "chat": ("/v1/chat/completions", {"messages": chat, **sampled}),
        "long": ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}),
    }
    job = Job(lab.url, tmp_path)
    job.write(bodies)
    try:
        code, summary, said = job.run(timeout=3 * LONG)
    finally:
        job.close()
    assert (code, summary["answered"], summary["failed"]) == (1, 3, 1), said
    answers = {name: row["response"]["body"] for name, row in job.read(job.out).items()}
    with Client(lab.url, settings=Settings()) as client:
        direct = {
            "greedy": {"prompt": "Beautiful is", "max_tokens": 8},
            "sampled": {"prompt": "Now is", "n": 2, "logprobs": 1, **sampled},
            "chat": {"messages": chat, **sampled},
        }
        results = {
            name: client.submit(batch_bodies.GENERATE, payload, queue="gpu").result(timeout=LONG)
            for name, payload in direct.items()
        }
    assert answers["greedy"]["choices"][0]["text"] == results["greedy"]["text"]
    assert answers["greedy"]["model"] == "tiny"
    assert [choice["text"] for choice in answers["sampled"]["choices"]] == [
        choice["text"] for choice in results["sampled"]["choices"]
    ]
    assert answers["sampled"]["choices"][1]["logprobs"]["token_logprobs"] == [
        score["logprob"] for score in results["sampled"]["choices"][1]["logprobs"]
    ]
    message = answers["chat"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": results["chat"]["text"], "refusal": None}
    for name, result in results.items():
        usage = answers[name]["usage"]
        assert {**result["usage"], "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"]} == usage
    assert summary["completion_tokens"] == sum(result["usage"]["completion_tokens"] for result in results.values())
    (failed,) = job.read(job.errors).values()
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("long", 400)
    assert "context" in failed["error"]["message"]


@pytest.mark.slow
def test_the_page_shows_what_happens(lab: Lab, tmp_path: Path) -> None:
    """Its commands, in its order, on its input print what stands below them; figures of time and speed aside."""
    listed = blocks(PAGE)
    (source,) = [block.text for block in listed if block.language == "jsonl"]
    (tmp_path / "in.jsonl").write_text(source, encoding="utf-8")
    environment = {**os.environ, "PERDURE_REDIS_URL": lab.url}
    shown = [block.text for block in listed if block.language == "console"]
    assert shown
    for command, printed in re.findall(r"^\$ perdure (.*)\n((?:(?!\$ ).*\n)*)", "".join(shown), re.MULTILINE):
        done = subprocess.run(
            [PERDURE, *shlex.split(command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=2 * LONG,
            check=False,
        )
        assert done.returncode == (1 if "failed" in printed else 0), done.stderr
        assert without_figures(done.stdout) == without_figures(printed)


def without_figures(text: str) -> str:
    return re.sub(r"\d+:\d\d:\d\d|[\d,]+ tokens(/s)?", "#", text)


def test_the_page_names_every_option_and_every_status() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in batch_bodies.STATUS:
        assert f"`{name}`" in text
    for name in ("stream", "echo", "suffix", "best_of", "tools", "response_format"):
        assert f"`{name}`" in text
    usage = subprocess.run([PERDURE, "batch", "run", "--help"], capture_output=True, text=True, check=True).stdout
    for option in re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", usage, re.MULTILINE):
        assert f"`{option}`" in text or option in ("--url", "--help"), option
