"""Starting vLLM's engine, and what its answers depend on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any, Final

import torch
import vllm
from vllm import EngineArgs, LLMEngine
from vllm.utils.argparse_utils import FlexibleArgumentParser

from .....protocol.errors import SettingsError
from .....protocol.records import FailureKind
from .....protocol.settings import Settings
from .....recovery.failures import classify
from ...arithmetic import sampler_bits
from ...checks import MAX_ANSWERS
from ...hub import HubTokenizer
from ...sampler import VERSION
from ...weights.export import folder_of
from . import REFUSED, TESTED
from .processor import DurableSampler

ROWS: Final = 256
"""vLLM's rows at most, unless there are more slots: it prepares buffers for each."""

SAMPLE: Final = 64
PIECE: Final = 64 * 1024
"""Of a large file so many pieces of so many bytes, spread over it, make its fingerprint: all of it would take minutes.
"""


def start(settings: Settings) -> Any:
    """vLLM's engine for the settings' model.

    Raises :class:`SettingsError` for arguments that vLLM does not know or that are not to be set, and for what it says
    of the model.
    """
    if not vllm.__version__.startswith(f"{TESTED}."):
        warnings.warn(f"vLLM {vllm.__version__} is not the tested {TESTED}", stacklevel=2)
    try:
        args = arguments(settings)
        args.logits_processors = [DurableSampler]
        return LLMEngine.from_engine_args(args)
    except SettingsError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if classify(error) is not FailureKind.ERROR:
            raise  # the device's, or its memory's: nothing is wrong with the settings
        raise SettingsError(f"vLLM cannot load PERDURE_MODEL={settings.model}: {error}") from error


def arguments(settings: Settings) -> EngineArgs:
    """vLLM's arguments, which its own parser reads."""
    model = folder_of(settings)
    if not Path(model).is_dir() and (Path(model).is_absolute() or model.startswith((".", "~"))):
        raise SettingsError(f"PERDURE_MODEL={model}: there is no such folder")
    # Each answer is a row. Those of one request go on side by side: one that waited for a row would hold up all of its
    # outputs, and with fewer rows than answers a neighbour would wait for whole answers.
    rows = max(settings.slots, min(MAX_ANSWERS * settings.slots, ROWS))
    words = ["--model", model, "--max-num-seqs", str(rows), "--disable-log-stats"]
    for entry in settings.engine_args:
        name, sign, value = entry.partition("=")
        name = name.strip().replace("-", "_")
        if why := REFUSED.get(name):
            raise SettingsError(f"PERDURE_ENGINE_ARGS: {name} cannot be set: {why}")
        option = f"--{name.replace('_', '-')}"
        if not sign or value.lower() == "true":
            words.append(option)
        elif value.lower() == "false":
            words.append(f"--no-{option[2:]}")
        else:
            words += [option, value]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return EngineArgs.from_cli_args(parser.parse_args(words))
    except SystemExit:
        line = (said.getvalue().strip().splitlines() or ["refused"])[-1].rpartition("error: ")[2]
        raise SettingsError(f"PERDURE_ENGINE_ARGS: vLLM does not take them: {line}") from None


def facts_of(engine: Any) -> dict[str, Any]:
    """What decides about the last bit of an answer, beside the model."""
    config = engine.vllm_config
    device = torch.device(config.device_config.device_type)
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": device.type,
        "dtype": str(config.model_config.dtype),
        "cache_dtype": str(config.cache_config.cache_dtype),
        "quantization": str(config.model_config.quantization),
        "block": config.cache_config.block_size,
        "tokens": config.scheduler_config.max_num_batched_tokens,
        "rows": config.scheduler_config.max_num_seqs,
        "eager": config.model_config.enforce_eager,
        "invariant": os.environ.get("VLLM_BATCH_INVARIANT", ""),
        "sampler": sampler_bits(device),
    }
    if device.type == "cuda":
        facts |= {"name": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    else:
        facts |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return facts


def meaning_of(model: Any, tokenizer: HubTokenizer) -> dict[str, str]:
    """What an answer means: the model's files, its tokenizer and template, and the sampler."""
    meaning = {
        "tokenizer": hashlib.sha256(tokenizer.definition.encode()).hexdigest(),
        "sampler": str(VERSION),
        # Not the whole configuration: another release of transformers adds to it.
        "overrides": json.dumps(model.hf_overrides, sort_keys=True, default=str),
        "context": str(model.max_model_len),
    }
    folder = Path(model.model)
    if not folder.is_dir():
        commit = getattr(model.hf_config, "_commit_hash", None) or model.revision or ""
        return meaning | {"model": f"{model.model}@{commit}"}
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".json", ".safetensors", ".bin", ".pt", ".gguf", ".model", ".jinja"}:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + _sampled(path))
    return meaning | {"model": digest.hexdigest()}


def _sampled(path: Path) -> bytes:
    """A digest of a file: of all of a small one, of :data:`SAMPLE` pieces of a large one."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= SAMPLE * PIECE:
            digest.update(file.read())
        else:
            for number in range(SAMPLE):
                file.seek(number * (size - PIECE) // (SAMPLE - 1))
                digest.update(file.read(PIECE))
    return digest.digest()
