"""What the sampler computes here, as a part of fingerprints."""

from __future__ import annotations

import hashlib

import numpy
import torch

from . import sampler
from .noise import exponential, uniform
from .parameters import Parameters

_SEED = 1


def sampler_bits(device: torch.device) -> str:
    """A digest of what the sampler computes on this device from some invented rows.

    Its exponentials and logarithms are the library's, which has other code for other processors. The
    version of the arithmetic is in it as well.
    """
    rows = ((uniform(_SEED, 0, numpy.arange(3 * 4096)) * 2 - 1) * 8).astype(numpy.float32).reshape(3, 4096)
    logits = torch.from_numpy(rows).to(device)
    fields = {
        "token_ids": [0],
        "temperature": 0.9,
        "min_p": 1e-4,
        "top_k": 2000,
        "top_p": 0.97,
        "seed": _SEED,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.1,
        "logit_bias": {3: -1.1, 4000: 2.3},
        "min_tokens": 90,
        "max_tokens": 90,
    }
    parameters = Parameters.of(fields, "")
    output = [number % 50 for number in range(80)]
    digest = hashlib.sha256(f"{sampler.VERSION} ".encode())
    for _ in range(32):
        some = [sampler.SampledRow(parameters, range(40, 90), output, (4000,)) for _ in rows]
        chosen = sampler.choose(logits, some)
        digest.update(repr(chosen).encode())
        output.append(chosen[0])
    adjusted = logits[0].clone()
    sampler.SampledRow(parameters, range(40, 90), output[:80], (4000,)).adjust(adjusted)
    weights = torch.exp(adjusted - adjusted.max())
    digest.update(weights.cpu().numpy().tobytes())
    digest.update(exponential([(_SEED, 1)], 4096, device).cpu().numpy().tobytes())
    digest.update(repr(sampler.score(rows[0], 7, 20)).encode())
    return digest.hexdigest()
