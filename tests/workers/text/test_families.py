"""The models that the engine runs beside Llama 2: each against ``transformers``, and exact at every token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.tasks.base import Request
from perdure.workers.text import Generate
from perdure.workers.text.bundle import Bundle
from perdure.workers.text.golden import run_alone
from perdure.workers.text.model.exactness import check_operators
from perdure.workers.text.model.llama import Llama, Run
from perdure.workers.text.model.operators import Operators
from perdure.workers.text.model.parallel import ParallelLlama
from perdure.workers.text.weights.models import read
from tests.kit.workers.models import write_gguf
from tests.kit.workers.peers import save_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama 3": {"kind": "llama", "rope_parameters": LLAMA3},
    "llama 3, a head": {"kind": "llama", "rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2", "rope_parameters": PLAIN},
    "qwen3": {"kind": "qwen3", "rope_parameters": PLAIN, "head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"kind": "mistral", "rope_parameters": PLAIN, "sliding_window": None},
    "mistral, a window": {"kind": "mistral", "rope_parameters": PLAIN, "sliding_window": 256, "head_dim": 32},
}
COMMON = {"max_position_embeddings": 256, "rms_norm_eps": 1e-5}
# Three chunks of prefill, beyond the context that Llama 3's scaling takes for that of the training.
PROMPT = [5, 80, 99, 7, 123, 200, 31, 5, 5, 64] * 7


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(folder: Path, family: str, **changes: Any) -> Any:
    return save_model(folder, **COMMON | FAMILIES[family] | changes)


def as_gguf(path: Path, model: Any, more: Callable[[Any], None] = lambda writer: None) -> None:
    """The same model in a GGUF file, with what its converter would say of it, and ``more``."""
    config = model.config
    inverse = model.model.rotary_emb.inv_freq
    base = config.rope_parameters["rope_theta"]
    width = 2 * len(inverse)
    factors = base ** -(torch.arange(0, width, 2) / width) / inverse

    def edit(writer: Any) -> None:
        if width != config.hidden_size // config.num_attention_heads:
            writer.add_key_length(width)
            writer.add_value_length(width)
            writer.add_rope_dimension_count(width)
        if config.rope_parameters["rope_type"] == "llama3":
            writer.add_tensor("rope_freqs.weight", factors.numpy().astype("f4"))
        more(writer)

    w = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if not config.tie_word_embeddings:
        w["lm_head.weight"] = model.lm_head.weight.detach()
    kind = config.model_type if config.model_type.startswith("qwen") else "llama"
    write_gguf(path, w, architecture=kind, edit=edit, head=width)


def logits_of(bundle: Bundle, count: int) -> tuple[list[int], list[Any]]:
    """Greedy tokens after the prompt, and the logits that they are from: prefill, then decode passes."""
    llama = Llama(bundle, torch.device("cpu"), 4)
    keys = llama.keys(len(PROMPT) + count)
    place = 0
    while place < len(PROMPT):
        _, end = llama.chunk_at(place, len(PROMPT))
        last = llama.prefill(keys, place, PROMPT[place:end])
        place = end
    found = [llama.logits(last)[0]]
    tokens = [int(found[0].argmax())]
    while len(tokens) < count:
        last = llama.decode([Run(keys, len(PROMPT) + len(tokens) - 1, tokens[-1:])])
        found.append(llama.logits(last)[0])
        tokens.append(int(found[-1].argmax()))
    return tokens, found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    """Logits, and with them greedy tokens; from a folder and from GGUF."""
    model = save(tmp_path / "model", family, eos_token_id=None)
    as_gguf(tmp_path / "model.gguf", model)
    with torch.inference_mode():
        expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
        whole = model(torch.tensor([PROMPT + expected])).logits[0, len(PROMPT) - 1 : -1]
    for name in ("model", "model.gguf"):
        tokens, logits = logits_of(read(Settings(model=str(tmp_path / name))), len(expected))
        assert tokens == expected
        torch.testing.assert_close(torch.from_numpy(numpy.stack(logits)), whole, atol=2e-5, rtol=0)


def test_a_file_from_the_cache_is_the_same_model(tmp_path: Path) -> None:
    """The factors, biases and norms as well."""
    for family in ("llama 3", "qwen2", "qwen3"):
        path = tmp_path / f"{family}.gguf"
        as_gguf(path, save(tmp_path / family, family))
        first, second = (read(Settings(model=str(path))) for _ in range(2))
        assert (first.shape, first.vocabulary) == (second.shape, second.vocabulary)
        assert all(torch.equal(second.tensors[name], tensor) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama 3", "qwen2", "qwen3", "mistral, a window"])
def test_it_resumes_at_every_token_to_the_last_byte(tmp_path: Path, family: str, dtype: str) -> None:
    """Greedy and sampled; alone, and with the cut ones side by side."""
    save(tmp_path / "model", family)
    task = Generate(Settings(model=str(tmp_path / "model"), device="cpu", threads=1, dtype=dtype, slots=4))
    task.load()
    for payload in (
        {"token_ids": PROMPT, "max_tokens": 12, "min_tokens": 12, "seed": 1, "logprobs": 2},
        {"token_ids": PROMPT, "max_tokens": 12, "min_tokens": 12, "seed": 2, "temperature": 1.0, "logprobs": 2},
    ):
        outputs, result = run_alone(task, Request(id="whole", payload=payload))
        cuts = range(len(outputs) + 1)
        for cut in cuts:
            request = Request(id=f"cut-{cut}", payload=payload, outputs=outputs[:cut])
            assert run_alone(task, request) == (outputs[cut:], result)
        rest = {f"joint-{cut}": cut for cut in cuts}
        waiting, ends = list(rest), dict[str, Any]()
        while len(ends) < len(rest):
            while waiting and len(waiting) > len(rest) - len(ends) - task.slots:
                name = waiting.pop(0)
                task.admit(Request(id=name, payload=payload, outputs=outputs[: rest[name]]))
            ends |= {step.request_id: step.result for step in task.step() if step.ends}
        assert all(end == result for end in ends.values())


class Broken(Operators):
    """One head's norm is wrong in the last row, in its last bit."""

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        result = super().norm_heads(x, weight, epsilon)
        result[-1, 0, 0] = torch.nextafter(result[-1, 0, 0], torch.tensor(9.0))
        return result


def test_an_inexact_head_norm_is_found(tmp_path: Path) -> None:
    save(tmp_path, "qwen3")
    bundle = read(Settings(model=str(tmp_path)))
    device = torch.device("cpu")
    check_operators(Llama(bundle, device, 4))
    with pytest.raises(SettingsError, match="head norm gives other bits"):
        check_operators(Llama(bundle, device, 4, Broken(device, torch.float32, 4)))


class Ranks:
    """Two ranks in two threads: what a rank gives is added to what the other one gives, in their order."""

    def __init__(self) -> None:
        self.parts: dict[int, torch.Tensor] = {}
        self.barrier = threading.Barrier(2, timeout=60)

    def of(self, rank: int) -> Any:
        def all_reduce(part: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = part
            self.barrier.wait()
            whole = self.parts[0] + self.parts[1]
            self.barrier.wait()
            return whole

        return SimpleNamespace(rank=rank, world=2, all_reduce=all_reduce)


@pytest.mark.parametrize("family", ["llama 3", "qwen2", "qwen3"])
def test_two_ranks_compute_what_one_computes(tmp_path: Path, family: str) -> None:
    """Each with the biases of its own heads, and with the norms of all."""
    save(tmp_path, family)
    bundle, ranks, device = read(Settings(model=str(tmp_path))), Ranks(), torch.device("cpu")
    expected = Llama(bundle, device, 4)
    models = [ParallelLlama(bundle, device, 4, ranks.of(rank)) for rank in range(2)]

    def logits(model: Llama) -> Any:
        return model.logits(model.prefill(model.keys(32), 0, PROMPT[:32]))

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(logits, models))
    assert numpy.array_equal(found[0], found[1])
    numpy.testing.assert_allclose(found[0], logits(expected), atol=2e-5)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama 3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling 'yarn'"),
        ("llama 3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling 'linear'"),
        ("llama 3", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "does not say its low_freq_factor"),
        ("llama 3", {"rope_scaling": LLAMA3 | {"factor": 0}}, "finite number above 0|division"),
        ("llama 3", {"rope_scaling": LLAMA3 | {"factor": "x"}}, "no such shape"),
        ("llama 3", {"rope_scaling": {"full_attention": PLAIN}}, "rope_scaling by layer"),
        ("llama 3", {"rope_scaling": [1]}, "no such shape"),
        ("llama 3", {"partial_rotary_factor": 0.5}, "of 0.5 of each head"),
        ("llama 3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 64}, "sliding_window 64 is not supported: it is less than the context of 256"),
        ("mistral", {"sliding_window": ...}, None),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window 4096"),
        ("qwen2", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, "sliding_window 64"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("qwen3", {"model_type": "qwen3_moe"}, "engine runs llama, mistral, qwen2, qwen3; for others"),
    ],
)
def test_what_is_not_supported_is_refused_at_load(
    tmp_path: Path, family: str, changes: dict[str, Any], named: str | None
) -> None:
    """And never run as something that it is not; what only looks so is run."""
    save(tmp_path, family)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("layer_types", None)
    if "rope_scaling" in changes:
        del values["rope_parameters"]
    values = {name: value for name, value in (values | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    if named is None:
        assert read(Settings(model=str(tmp_path))).shape.layers == 2
        return
    with pytest.raises(SettingsError, match=named):
        read(Settings(model=str(tmp_path)))


def test_an_older_configuration_says_the_same(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling``, as they were before ``rope_parameters``."""
    save(tmp_path, "llama 3")
    expected = read(Settings(model=str(tmp_path))).shape
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read(Settings(model=str(tmp_path))).shape == expected
    assert replace(expected, rope_factors=()) != expected


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama 3", {"rope_freqs.weight": [1.0] * 7}, "scales 7 rotary frequencies, but has 8"),
        ("llama 3", {"rope_freqs.weight": [0.0] * 8}, "no finite number above 0"),
        ("qwen2", {"rope_freqs.weight": [1.0] * 8}, "tensors that are not supported: rope_freqs.weight"),
        ("mistral", {"blk.0.attn_q.bias": [1.0] * 64}, "tensors that are not supported: blk.0.attn_q.bias"),
        ("qwen2", {"blk.0.attn_k.bias": None}, "no tensor blk.0.attn_k.bias"),
        ("qwen3", {"blk.1.attn_k_norm.weight": [1.0] * 16}, r"should have the shape \(32,\)"),
        ("mistral", {"window": 64}, "a sliding window of 64, less than its context of 256"),
    ],
)
def test_a_gguf_file_that_is_not_supported_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], named: str
) -> None:
    """By its tensors and by what it says."""

    def edit(writer: Any) -> None:
        for name, values in changes.items():
            if name == "window":
                writer.add_sliding_window(values)
                continue
            writer.tensors[0].pop(name, None)
            if values is not None:
                writer.add_tensor(name, numpy.array(values, "f4"))

    as_gguf(tmp_path / "model.gguf", save(tmp_path / "model", family), edit)
    with pytest.raises(SettingsError, match=named):
        read(Settings(model=str(tmp_path / "model.gguf")))
