"""The files of a model folder: JSON objects, and which of its safetensors files have the model's tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from ....protocol.errors import SettingsError

_WHOLE: Final = "model.safetensors"
_INDEX: Final = ".safetensors.index.json"


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """The object in a file; an empty one if it need not be there. Raises :class:`SettingsError`."""
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"{path} does not hold an object")
    return value


def read_text(path: Path) -> str:
    """The text of a file. Raises :class:`SettingsError`."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


def weight_files(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Path], list[Path]]:
    """Which file has which tensor, and all files that were read for that.

    As ``transformers`` finds them: the file that config.json names in ``transformers_weights``, else
    model.safetensors, else the files that its index names. Whatever else lies in the folder is not the model.

    Raises :class:`SettingsError`, naming the file that is missing.
    """
    if (folder / "adapter_config.json").exists():
        raise SettingsError(
            f"{folder} holds an adapter (adapter_config.json), which is not supported; merge it into its model with "
            "peft's merge_and_unload() and save that"
        )
    named = config.get("transformers_weights")
    names = [_WHOLE, f"model{_INDEX}"] if named is None else [_plain(named, folder / "config.json")]
    for path in (folder / name for name in names):
        if path.is_file():
            return _indexed(path) if path.name.endswith(_INDEX) else (dict.fromkeys(_names(path), path), [path])
    raise SettingsError(f"{folder} holds neither {' nor '.join(names)}{_instead(folder)}")


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of those of the files that there are, in hex."""
    result = hashlib.sha256()
    for path in files:
        if path.exists():
            with path.open("rb") as file:
                result.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return result.hexdigest()


def _indexed(index: Path) -> tuple[dict[str, Path], list[Path]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SettingsError(f"{index} has no weight_map that says which file has which tensor")
    files = {name: index.parent / _plain(name, index) for name in dict.fromkeys(places.values())}
    for path in files.values():
        if not path.is_file():
            raise SettingsError(f"{index} names {path.name}, which is not in the folder; download the model again")
    held = {name: set(_names(path)) for name, path in files.items()}
    for tensor, name in places.items():
        if tensor not in held[name]:
            raise SettingsError(f"{index} says that {name} has the tensor {tensor}, which it has not")
    return {tensor: files[name] for tensor, name in places.items()}, [index, *files.values()]


def _plain(name: Any, source: Path) -> str:
    """A name of a file in the folder itself: what a download says must not lead out of it."""
    if not isinstance(name, str) or Path(name).name != name or not name.endswith((".safetensors", _INDEX)):
        raise SettingsError(f"{source} names {name!r:.80} as a file with weights, which is no *.safetensors beside it")
    return name


def _instead(folder: Path) -> str:
    """What is there in the place of weights, and what to do about it."""
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f"; {', '.join(found[:3])} may be parts or copies of a model, and no index says so: "
            "save the model again with save_pretrained()"
        )
    if found := sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"))):
        return f"; weights of torch ({found[0]}) are not read: save the model again with save_pretrained()"
    return ""


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return list(opened.keys())
    except Exception as error:  # the package has its own error, which derives from Exception only
        raise SettingsError(f"{file} cannot be read as safetensors: {error}") from error
