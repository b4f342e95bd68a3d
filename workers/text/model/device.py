"""Which device computes, and how it is told to do so the same way every time."""

from __future__ import annotations

import os
import platform
import re

import numpy
import tokenizers
import torch

from ....protocol.errors import SettingsError
from ....protocol.settings import Settings


def prepare_device(settings: Settings) -> torch.device:
    """The settings' device, made ready: threads, precision, determinism. Process-wide.

    Raises :class:`SettingsError`; its text begins with ``CUDA_UNAVAILABLE`` when CUDA was asked for
    and is not there. The CPU never stands in for it silently.
    """
    name = settings.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SettingsError(f"PERDURE_DEVICE must be auto, cpu, cuda or cuda:N, not {name!r}")
    # Read by cuBLAS when its first handle is made; without it, its workspaces vary, and sums with them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= found:
            raise SettingsError(
                f"CUDA_UNAVAILABLE: PERDURE_DEVICE={name}, but torch {torch.__version__} sees {found} CUDA devices; "
                "check nvidia-smi and that torch is a CUDA build, or set PERDURE_DEVICE=cpu"
            )
        device = torch.device("cuda", index)
    else:
        device = torch.device("cuda", 0) if found else torch.device("cpu")
    # Also where the number stays: torch keeps MKL from choosing its own threads only once it was told.
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("highest")  # no TF32, no bfloat16 behind float32
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
    return device


def describe_device(device: torch.device) -> dict[str, str]:
    """What of the machine and its libraries decides about the last bit of a result."""
    result = {
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
        "machine": platform.machine(),
        "device": device.type,
    }
    if device.type == "cuda":
        result["name"] = torch.cuda.get_device_name(device)
        result["capability"] = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
        result["cuda"] = str(torch.version.cuda)
    else:
        result["capability"] = torch.backends.cpu.get_cpu_capability()
        result["threads"] = str(torch.get_num_threads())
    return result
