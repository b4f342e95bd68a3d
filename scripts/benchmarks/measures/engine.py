"""The part ``engine``: prefill and decode of the built-in engine against ``generate`` of transformers.

The same weights (ours, written down as a folder that transformers reads), dtype and threads, greedy, prompts of the
same tokens, in rounds that alternate. Prefill: the passes that compute prompts, up to each one's first token. Decode:
the tokens after that, from when all have their first one; ours puts decode passes between those of prefill, which count
for neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ....protocol.settings import Settings
from ....workers.tasks.base import NOTHING, Request
from ....workers.text import Generate
from ..figures import Series, median
from ..processes import BenchmarkFailed, Crew, PeerProcess
from ..systems import PEERS

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """``prompt`` and ``new`` are tokens of each request."""

    rounds: int = 5
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 128
    new: int = 128
    model: str = "smollm2"
    dtype: str = "float32"


QUICK = EngineSizes(rounds=3, batches=(8,), new=32)
SMOKE = EngineSizes(rounds=1, batches=(2,), prompt=16, new=8, model="tiny")


class EngineBenchmark:
    """Ours in this process, transformers in one of its own; never both at work."""

    def __init__(self, crew: Crew, sizes: EngineSizes, python: str, say: Callable[[str], None]) -> None:
        self.crew, self.sizes, self.python, self.say = crew, sizes, python, say
        self.series = Series()
        self.threads = len(os.sched_getaffinity(0))
        self.settings = Settings(
            model=sizes.model,
            dtype=sizes.dtype,
            device="cpu",
            slots=max(sizes.batches),
            threads=self.threads,
            model_path=os.environ.get("PERDURE_MODEL_PATH", ""),
        )
        self.equal: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """The figures as they go into the JSON file."""
        folder = self.crew.folder / "weights"
        vocabulary = write_weights(self.settings, folder)
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait must not take what the other one needs
        other = self.crew.agent([self.python, str(PEERS / "bench_transformers.py")], "", "transformers")
        facts = other.ask(300, do="load", folder=str(folder), dtype=self.sizes.dtype, threads=self.threads)
        task = Generate(self.settings)
        task.load()
        for number in range(1, self.sizes.rounds + 1):
            for batch in self.sizes.batches:
                self._round(task, other, batch, vocabulary)
            self.say(f"round {number} done")
        return {
            "sizes": asdict(self.sizes), "threads": self.threads, "attention": facts["attention"],
            "equal_tokens": self.equal, **self.series.to_json(),
        }  # fmt: skip

    def _round(self, task: Generate, other: PeerProcess, batch: int, vocabulary: int) -> None:
        prompts = [prompt_of(place, self.sizes.prompt, vocabulary) for place in range(batch)]
        theirs = other.ask(600, do="generate", prompts=prompts, new=self.sizes.new)
        tokens = batch * self.sizes.prompt
        after = batch * (self.sizes.new - 1)
        found = {"prefill": tokens / theirs["prefill_s"], "decode": after / theirs["decode_s"]}
        self.series.add(f"transformers, batch {batch}", found)
        for exact in (True, False):
            name = f"perdure {'exact' if exact else 'not exact'}, batch {batch}"
            prefill, decode, decoded, ids = generate(task, prompts, self.sizes.new, exact)
            self.series.add(name, {"prefill": tokens / prefill, "decode": decoded / decode})
            pairs = [
                (a, b) for mine, their in zip(ids, theirs["ids"], strict=True) for a, b in zip(mine, their, strict=True)
            ]
            self.equal[name] = sum(a == b for a, b in pairs) / len(pairs)


def generate(
    task: Generate, prompts: list[list[int]], new: int, exact: bool
) -> tuple[float, float, int, list[list[int]]]:
    """Seconds of the passes that computed prompts, seconds of those with a row for every request, tokens of the
    latter, and all ids.
    """
    for place, prompt in enumerate(prompts):
        payload = {"token_ids": prompt, "max_tokens": new, "min_tokens": new, "exact": exact}
        task.admit(Request(id=str(place), payload=payload))
    ids: dict[str, list[int]] = {str(place): [] for place in range(len(prompts))}
    prefill = decode = 0.0
    decoded = ended = 0
    while ended < len(prompts):
        began = time.perf_counter()
        steps = task.step()
        seconds = time.perf_counter() - began
        # A pass computes a part of a prompt or a row for each request past its prompt, never both.
        if any(step.output is NOTHING or not ids[step.request_id] for step in steps):
            prefill += seconds
        elif all(ids.values()):
            decode += seconds
            decoded += len(steps)
        for step in steps:
            if step.error is not None:
                raise BenchmarkFailed(f"the engine failed: {step.error}")
            if step.output is not NOTHING:
                ids[step.request_id].append(step.output["token"])
            ended += step.ends
    return prefill, decode, decoded, list(ids.values())


def prompt_of(place: int, length: int, vocabulary: int) -> list[int]:
    """Ids that mean nothing, other ones for each request; the time does not depend on them."""
    return [(1000 + 37 * place + 7 * index) % (vocabulary - 10) + 5 for index in range(length)]


def write_weights(settings: Settings, folder: Path) -> int:
    """Our weights as transformers reads them; returns the size of the vocabulary."""
    from safetensors.torch import save_file

    from ....workers.text.weights.models import read

    bundle = read(settings)
    shape = bundle.shape
    heads, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    tensors = {"model.embed_tokens.weight": bundle.tensors["embedding"], "model.norm.weight": bundle.tensors["norm"]}
    if "head" in bundle.tensors:
        tensors["lm_head.weight"] = bundle.tensors["head"]
    for number in range(shape.layers):
        ours, theirs = f"layers.{number}", f"model.layers.{number}"
        query, key, value = bundle.tensors[f"{ours}.qkv"].split([heads, keys, keys])
        gate, up = bundle.tensors[f"{ours}.gate_up"].chunk(2)
        tensors |= {
            f"{theirs}.input_layernorm.weight": bundle.tensors[f"{ours}.norm_in"],
            f"{theirs}.self_attn.q_proj.weight": query,
            f"{theirs}.self_attn.k_proj.weight": key,
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": bundle.tensors[f"{ours}.out"],
            f"{theirs}.post_attention_layernorm.weight": bundle.tensors[f"{ours}.norm_mid"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": bundle.tensors[f"{ours}.down"],
        }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width, "max_position_embeddings": shape.context, "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base, "tie_word_embeddings": "head" not in bundle.tensors, "dtype": settings.dtype,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return shape.vocabulary


def own_interpreter() -> str:
    """That of this environment, if it has transformers; else an empty text."""
    return sys.executable if importlib.util.find_spec("transformers") else ""


def ratios(series: Series) -> Figures:
    """Ours against transformers, of each batch, round by round."""
    found: Figures = {}
    for name, figures in series.rounds.items():
        if not name.startswith("perdure"):
            continue
        way, _, batch = name.removeprefix("perdure ").partition(", batch ")
        other = series.rounds[f"transformers, batch {batch}"]
        for figure, values in figures.items():
            pairs = zip(values, other[figure], strict=True)
            found[f"engine_{figure}_{way.replace(' ', '_')}_batch_{batch}"] = median(a / b for a, b in pairs if a and b)
    return found
