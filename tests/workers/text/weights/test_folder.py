"""Which files of a folder are the model: the tensors are those that ``transformers`` reads from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.workers.text.bundle import Bundle
from perdure.workers.text.weights.models import read
from tests.kit.workers.peers import load_model, save_model

INDEX = "model.safetensors.index.json"


def load(folder: Path) -> Bundle:
    return read(Settings(model=str(folder)))


def assert_same_tensors(folder: Path) -> None:
    """One of each kind: in the first file, in the last one, put together from several."""
    bundle, peer = load(folder), load_model(folder)
    last = peer.model.layers[-1]
    found = {
        "embedding": peer.model.embed_tokens.weight,
        "layers.1.gate_up": torch.cat((last.mlp.gate_proj.weight, last.mlp.up_proj.weight)),
        "layers.1.down": last.mlp.down_proj.weight,
        "norm": peer.model.norm.weight,
    }
    assert all(torch.equal(bundle.tensors[name], tensor) for name, tensor in found.items())
    assert torch.equal(bundle.tensors.get("head", bundle.tensors["embedding"]), peer.lm_head.weight)


def stray(folder: Path, name: str, model: Any) -> None:
    """Other weights of the same model, in a file that somebody left there."""
    save_file({key: torch.randn_like(value) for key, value in model.state_dict().items()}, folder / name)


@pytest.mark.parametrize("shard", ["60KB", "1GB"])
@pytest.mark.parametrize("name", ["a-old.safetensors", "zz-backup.safetensors", "consolidated.safetensors"])
def test_only_the_files_of_the_index_are_the_model(tmp_path: Path, name: str, shard: str) -> None:
    model = save_model(tmp_path, shard=shard)
    assert (tmp_path / INDEX).exists() == (shard == "60KB")
    if name.startswith("consolidated"):
        save_file({"tok_embeddings.weight": torch.zeros(4, 4)}, tmp_path / name)
    else:
        stray(tmp_path, name, model)
    digest = load(tmp_path).digest
    assert_same_tensors(tmp_path)
    (tmp_path / name).unlink()
    assert load(tmp_path).digest == digest


def test_each_tensor_is_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    """The other files have one of the same name."""
    save_model(tmp_path, shard="60KB")
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    first = min(places.values())
    name = next(name for name, file in places.items() if file == first)
    expected = load_file(tmp_path / first)[name]
    for file in {*places.values()} - {first}:
        save_file(load_file(tmp_path / file) | {name: torch.zeros_like(expected)}, tmp_path / file)
    ours = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}[name]
    assert torch.equal(load(tmp_path).tensors[ours], expected)


def test_one_whole_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    """Saved as a whole over what was in parts: the parts stay, and are the older weights."""
    save_model(tmp_path, shard="60KB")
    stray(tmp_path, "model.safetensors", load_model(tmp_path))
    assert_same_tensors(tmp_path)


def test_config_json_may_name_the_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    stray(tmp_path, "a.safetensors", model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "a.safetensors"}))
    assert_same_tensors(tmp_path)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_weights_are_stored_once_or_twice(tmp_path: Path, kept: str) -> None:
    """Under either name; where both are there and differ, they are not tied."""
    model = save_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    names = {"model.embed_tokens.weight": weight, "lm_head.weight": weight + 1 if kept == "both" else weight}
    tensors |= names if kept == "both" else {kept: weight}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_tensors(tmp_path)
    assert model.config.tie_word_embeddings


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, shard="60KB")
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(SettingsError, match=r"names model-00002-of-\d+\.safetensors, which is not in the folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        (None, "no weight_map"),
        ([], "no weight_map"),
        ({"a": 1}, "names 1 as a file"),
        ({"a": "../other.safetensors"}, "names '../other.safetensors' as a file"),
        ({"a": "model.bin"}, "no \\*.safetensors beside it"),
        ({"a": "part.safetensors"}, "has the tensor a, which it has not"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, weight_map: Any, named: str) -> None:
    save_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SettingsError, match=named):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["config.json", "adapter_config.json", "model.safetensors"], "merge_and_unload"),
        (["config.json", "pytorch_model.bin"], r"weights of torch \(pytorch_model.bin\) are not read"),
        (["config.json", "consolidated.safetensors"], "consolidated.safetensors may be parts or copies"),
        (["config.json"], "neither model.safetensors nor model.safetensors.index.json"),
        (["config.json", "model.safetensors"], "cannot be read as safetensors"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path: Path, names: list[str], named: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SettingsError, match=named):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    """Before it is put together with others, which would say less."""
    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 63)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=r"k_proj.weight should have the shape \(32, 64\) .* has \(32, 63\)"):
        load(tmp_path)
