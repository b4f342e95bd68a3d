"""transformers: ``generate`` with its cache, greedy, on the weights and with the threads that it is given."""

from __future__ import annotations

import time
from typing import Any

import kit
import torch
from transformers import AutoModelForCausalLM


class Transformers(kit.Agent):
    """Has commands of its own."""

    def __init__(self) -> None:
        super().__init__(kit.Producer())

    async def on_load(self, folder: str, dtype: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        return {"attention": self.model.config._attn_implementation}

    async def on_generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Seconds to the first token of all, and those of the tokens after it."""
        tokens = torch.tensor(prompts)
        first, _ = self._timed(tokens, 1)
        whole, ids = self._timed(tokens, new)
        return {"prefill_s": first, "decode_s": whole - first, "ids": ids}

    def _timed(self, tokens: Any, new: int) -> tuple[float, list[list[int]]]:
        began = time.perf_counter()
        with torch.inference_mode():
            found = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - began, found[:, tokens.shape[1] :].tolist()


if __name__ == "__main__":
    kit.serve_agent(Transformers())
