"""What the tests say of a GPU, and the promise that an answer goes on from any token as if nothing had happened."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final
from xml.etree import ElementTree

import tokenizers
import torch

from ....protocol.settings import Settings
from ....workers.tasks.base import NOTHING, BatchTask, Request
from ....workers.text import Generate
from ....workers.text.transformers import CausalLM
from ....workers.text.weights.tiny import tiny
from ..models import SEED, SMALL, config, folder
from ..pack import ROOT
from ..stage import ReportStage, StepFailed

MARK: Final = "pytest.mark.gpu"


def gpu_tests(stage: ReportStage) -> None:
    """All tests that are marked so, by pytest itself, in this environment; on a CPU they skip themselves."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK in path.read_text(encoding="utf-8"))
    report = stage.folder / "tests.xml"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-p",
        "pytest_timeout",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "-v",
    ]
    # A warning of another torch than the one that the tests were written with is none of this.
    command += ["-W", "default", f"--basetemp={stage.folder / 'tests'}", f"--junitxml={report}", *map(str, files)]
    # Plugins of the machine are none of ours.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not report.exists():
        raise StepFailed(f"pytest wrote no report (exit status {status})")
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name", "") for case in suite.iter("testcase") if {item.tag for item in case} & {"failure", "error"}
    ]
    stage.note(**counts, seconds=float(suite.get("time", 0)))
    stage.expect(f"the tests pass ({', '.join(failed)} did not)", status == 0)
    if counts["skipped"] == counts["tests"] and not stage.needs_cuda(f"all {counts['tests']} tests skip themselves"):
        stage.expect("the tests find the device", kept=False)


def resume(stage: ReportStage) -> None:
    """Cut at random tokens, and compared to the last token: alone, and in a full batch beside others."""
    tokens, number, slots = (24, 3, 4) if stage.rehearsal else (64, 8, 8)
    chance = random.Random(SEED)
    cuts = sorted(chance.sample(range(1, tokens), number))
    stage.note(tokens=tokens, cuts=", ".join(map(str, cuts)))
    for dtype in ("float32", "bfloat16"):
        settings = Settings(
            model=str(folder(stage)), device=stage.device, dtype=dtype, slots=slots, threads=1 if stage.rehearsal else 0
        )
        began = time.monotonic()
        task = Generate(settings)
        task.load()
        loaded = time.monotonic() - began
        whole = run(task, [_request("whole", tokens)])["whole"]
        alone = [run(task, [_request("alone", tokens, whole[0][:cut])])["alone"] for cut in cuts]
        full = run(task, _beside(tokens, whole[0], cuts))
        kept = {cut: (whole[0][cut:], whole[1]) for cut in cuts}
        equal_alone = sum(found == kept[cut] for cut, found in zip(cuts, alone, strict=True))
        equal_full = sum(full[f"cut-{cut}"] == kept[cut] for cut in cuts)
        stage.expect(f"{dtype}: alone, every answer goes on as it would have", equal_alone == number)
        stage.expect(f"{dtype}: in a full batch, every answer goes on as it would have", equal_full == number)
        stage.row(
            dtype, {"load_s": loaded, "cuts": number, "equal_alone": equal_alone, "equal_in_a_full_batch": equal_full}
        )
        del task
        if stage.device == "cuda":
            torch.cuda.empty_cache()
    _adapter(stage, tokens, cuts)


def _adapter(stage: ReportStage, tokens: int, cuts: Sequence[int]) -> None:
    """It promises nothing of this; how often it comes out equal is an observation."""
    task = CausalLM(_small_llama, settings=Settings(device=stage.device, slots=2, threads=1))
    task.load()
    whole = run(task, [_request("whole", tokens)])["whole"]
    equal = 0
    for cut in cuts:
        outputs, result = run(task, [_request("again", tokens, whole[0][:cut])])["again"]
        equal += (whole[0][:cut] + outputs, result) == whole
    stage.row("transformers adapter, float32", {"cuts": len(cuts), "equal_alone": equal})


def _small_llama() -> tuple[Any, Any]:
    """A model of ``transformers`` with random weights, and a tokenizer of one token a byte."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(**{name: value for name, value in config(SMALL).items() if name != "model_type"})
    )
    inner = tokenizers.Tokenizer.from_str(tiny(torch.float32).vocabulary.definition)
    return model, PreTrainedTokenizerFast(tokenizer_object=inner)


def _request(name: str, tokens: int, outputs: Sequence[Any] = ()) -> Request:
    payload = {
        "prompt": "What outlives the process that began it? " * 3,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "seed": 7,
        "temperature": 1.0,
    }
    return Request(id=name, payload=payload, outputs=list(outputs))


def _beside(tokens: int, outputs: Sequence[Any], cuts: Sequence[int]) -> list[Request]:
    """The cut requests, each beside others that come and go."""
    requests = []
    for place, cut in enumerate(cuts):
        other = {"prompt": "x" * (5 + 31 * place), "max_tokens": 5 + 3 * place, "seed": place, "temperature": 0.7}
        requests += [_request(f"cut-{cut}", tokens, outputs[:cut]), Request(id=f"other-{place}", payload=other)]
    return requests


def run(task: BatchTask, requests: Sequence[Request]) -> dict[str, tuple[list[Any], Any]]:
    """New outputs and result of each, with every slot filled as soon as it is free. Raises what a request raises."""
    waiting = list(requests)
    outputs: dict[str, list[Any]] = {item.id: [] for item in requests}
    results: dict[str, Any] = {}
    running = 0
    while waiting or running:
        while waiting and running < task.slots:
            task.admit(waiting.pop(0))
            running += 1
        for step in task.step():
            if step.error is not None:
                raise step.error
            if step.output is not NOTHING:
                outputs[step.request_id].append(step.output)
            if step.result is not NOTHING:
                results[step.request_id] = step.result
                running -= 1
    return {name: (outputs[name], results[name]) for name in results}
