"""The cache of dequantised weights: used when it can be, never needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from perdure.workers.text.bundle import Bundle
from perdure.workers.text.weights.cache import cached
from perdure.workers.text.weights.tiny import tiny


class Reader:
    """Stands for a slow reader, and counts how often it was needed."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, path: Path, dtype: torch.dtype) -> Bundle:
        self.reads += 1
        return tiny(dtype)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perdure"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"one")
    return path


def assert_equal(found: Bundle, expected: Bundle) -> None:
    assert (found.digest, found.vocabulary, found.shape) == (expected.digest, expected.vocabulary, expected.shape)
    assert list(found.tensors) == list(expected.tensors)
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_reading_is_from_the_cache(home, model, dtype):
    """Equal in all, and aligned as memory from the allocator is."""
    reader = Reader()
    first, second = cached(model, dtype, reader), cached(model, dtype, reader)
    assert reader.reads == 1
    assert_equal(second, first)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in second.tensors.values())
    assert len(list(home.iterdir())) == 1


def test_each_dtype_is_cached_for_itself(home, model):
    """In either order."""
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        assert {tensor.dtype for tensor in cached(model, dtype, Reader()).tensors.values()} == {dtype}


def test_writing_into_what_was_mapped_changes_no_file(home, model):
    """Another worker maps the same pages."""
    reader = Reader()
    cached(model, torch.float32, reader)
    cached(model, torch.float32, reader).tensors["norm"][0] = 99
    assert cached(model, torch.float32, reader).tensors["norm"][0] == 1
    assert reader.reads == 1


def test_another_file_at_the_same_path_is_read_anew(home, model):
    """What is cached belongs to the file, not to its name."""
    reader = Reader()
    cached(model, torch.float32, reader)
    model.write_bytes(b"another")
    cached(model, torch.float32, reader)
    assert reader.reads == 2


def test_a_torn_file_is_read_anew_and_mended(home, model):
    """Whatever is there instead of it."""
    reader = Reader()
    expected = cached(model, torch.float32, reader)
    (stored,) = home.iterdir()
    content = stored.read_bytes()
    for reads, torn in enumerate((b"", content[:100], content[:-5], b"\xff" * 50, b"\x02" + bytes(7) + b"[]"), start=2):
        stored.unlink()  # a new file: what is mapped keeps the old one
        stored.write_bytes(torn)
        assert_equal(cached(model, torch.float32, reader), expected)
        assert reader.reads == reads
        assert stored.read_bytes() == content


def test_what_a_killed_writer_left_is_removed_in_time(home, model):
    """After an hour; before, somebody may be writing it."""
    reader = Reader()
    cached(model, torch.float32, reader)
    (stored,) = home.iterdir()
    old, young = (stored.with_name(f"{stored.name}{name}.part") for name in ("old", "young"))
    for part in (old, young):
        part.write_bytes(b"torn")
    os.utime(old, (0, 0))
    stored.unlink()
    cached(model, torch.float32, reader)
    assert sorted(home.iterdir()) == sorted([stored, young])


def test_a_home_that_cannot_be_written_costs_only_time(model, tmp_path, monkeypatch):
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    reader = Reader()
    assert_equal(cached(model, torch.float32, reader), tiny(torch.float32))
    assert_equal(cached(model, torch.float32, reader), tiny(torch.float32))
    assert reader.reads == 2
