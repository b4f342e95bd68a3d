"""States with tensors: what is captured comes back bit by bit, and what cannot be stored is refused with a way out."""

from __future__ import annotations

import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.protocol.codec import pack, unpack
from perdure.protocol.errors import InvalidRequest, PayloadTooLarge
from perdure.protocol.packed_state import CHUNK, PackedState, Stored, check_compression, pack_state, unpack_state
from perdure.protocol.tensors import CannotRead
from tests.kit.protocol.values import VALUES

LIMIT = 1 << 24

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip
NUMPY_DTYPES = ["?", "<i1", "<u2", ">i4", "<i8", "<f2", "<f4", ">f8", "<c8", "<M8[s]", "<U3", "S2"]
SHAPES = st.lists(st.integers(0, 4), max_size=4)


def stored(value: Any, compression: str = "none") -> bytes:
    return b"".join(pack_state(value, limit=LIMIT, compression=compression).stored.pieces)


def again(value: Any, compression: str = "none") -> Any:
    return unpack_state(stored(value, compression))


def bits(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


@st.composite
def torch_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits, also those of NaNs; some transposed, some with a stride, some on a part of a larger tensor."""
    dtype, shape = draw(st.sampled_from(TORCH_DTYPES)), draw(SHAPES)
    seed = draw(st.integers(0, 99))
    raw = torch.randint(
        0,
        2 if dtype is torch.bool else 256,
        (*shape, dtype.itemsize),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )
    tensor = raw.view(dtype).reshape(shape)
    way = draw(st.sampled_from(["whole", "transposed", "strided", "expanded"]))
    if tensor.dim() and way == "transposed":
        return tensor.transpose(0, -1)
    if tensor.dim() and way == "strided":
        return tensor[..., ::2]
    return tensor.expand(2, *shape) if way == "expanded" else tensor


@st.composite
def numpy_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    dtype, shape = np.dtype(draw(st.sampled_from(NUMPY_DTYPES))), draw(SHAPES)
    if dtype.kind == "U":
        return np.full(shape, draw(st.text("abü", max_size=3)), dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2 if dtype.kind == "b" else 256, count, np.uint8)
    array = np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    return array.T if draw(st.booleans()) else array


@given(torch_tensors(), numpy_arrays(), VALUES)
@settings(max_examples=60, deadline=None)
def test_tensors_come_back_bit_by_bit_wherever_they_stand(tensor, array, value):
    """Dtype, shape and bits, beside everything else that a state may hold; writable, on memory of their own."""
    result = again({"t": tensor, "rest": [value, (array, tensor)]})
    assert result["rest"][0] == value
    for copy in (result["t"], result["rest"][1][1]):
        assert (copy.dtype, copy.shape, bits(copy)) == (tensor.dtype, tensor.shape, bits(tensor))
        assert copy.is_contiguous()
        copy.zero_()
    assert bits(again(tensor)) == bits(tensor)
    copy = result["rest"][1][0]
    assert (copy.dtype, copy.shape, copy.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert copy.flags.writeable
    assert copy.flags.owndata


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_a_state_without_tensors_is_stored_as_ever(value):
    """Plain msgpack, which every release reads."""
    assert stored(value) == pack(value, limit=LIMIT, what="state")


def test_an_older_release_refuses_a_state_with_tensors():
    """It unpacks plain msgpack: bytes of another form must not give its task something that looks like a state."""
    for compression in ("none", "zstd"):
        with pytest.raises(ValueError, match="not a msgpack value"):
            unpack(stored({"t": torch.zeros(1000)}, compression))


def test_a_state_is_captured_when_it_is_given():
    """The task may go on in the same memory."""
    tensor, array, steps = torch.zeros(5), np.zeros(5), [1]
    packed = pack_state([tensor, array, steps], limit=LIMIT)
    tensor.fill_(1)
    array.fill(1)
    steps.append(2)
    first, second, third = unpack_state(b"".join(packed.stored.pieces))
    assert (first.tolist(), second.tolist(), third) == ([0.0] * 5, [0.0] * 5, [1])


def test_what_torch_adds_to_a_tensor_is_left_behind():
    """A gradient graph, a parameter, a lazy conjugate: the numbers are stored, plainly."""
    leaf = torch.ones(2, requires_grad=True)
    result = again([leaf, leaf * 2, torch.nn.Parameter(torch.ones(2)), torch.tensor([1 + 2j]).conj()])
    assert [type(item) for item in result] == [torch.Tensor] * 4
    assert not any(item.requires_grad for item in result)
    assert [item.tolist() for item in result] == [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], [1 - 2j]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_tensor_of_a_gpu_comes_back_on_the_cpu():
    """The next worker may have another device, or none; the task moves it."""
    tensor = torch.randn(64, 64, dtype=torch.bfloat16, device="cuda").t()
    copy = again(tensor)
    assert copy.device.type == "cpu"
    assert bits(copy) == bits(tensor.cpu())


class Masked(torch.Tensor):
    """A subclass, which may mean more than its numbers."""


def quantised() -> torch.Tensor:
    with pytest.warns(UserWarning, match="deprecated"):
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(3).to_sparse(), r"layout torch\.sparse_coo.*to_dense"),
        (lambda: torch.ones(3, device="meta"), "without data"),
        (lambda: torch.ones(3).as_subclass(Masked), "a Masked.*plain torch.Tensor"),
        (lambda: np.array([object()]), "Python objects.*tolist"),
        (lambda: np.zeros(2, [("a", "<f4"), ("b", "<i4")]), "array per field"),
        (lambda: np.ma.masked_array([1, 2]), r"a MaskedArray.*numpy\.asarray"),
        (quantised, "quantised.*int_repr"),
    ],
)
def test_a_refusal_names_the_place_and_a_way_out(make, said):
    """What is more than numbers in a shape is not stored as less."""
    with pytest.raises(InvalidRequest, match=said) as caught:
        pack_state({"a": [1, make()]}, limit=LIMIT)
    assert str(caught.value).startswith("state['a'][1] is ")


def test_other_things_are_refused_as_in_a_payload():
    """And a tensor as a key, which nobody could look up again."""
    with pytest.raises(InvalidRequest, match=r"^state\['a'\] is a set; .* and tensors"):
        pack_state({"t": torch.ones(1), "a": {1}}, limit=LIMIT)
    with pytest.raises(InvalidRequest, match=r"^a key of state\[0\] is a torch tensor"):
        pack_state([{torch.ones(1): 2}], limit=LIMIT)


@pytest.mark.parametrize("what", ["payload", "output", "result"])
@pytest.mark.parametrize("make", [lambda: torch.ones(3), lambda: np.ones(3)])
def test_only_a_state_holds_tensors(what, make):
    """Who reads the others may have neither library; the message says what to send."""
    with pytest.raises(InvalidRequest, match=rf"^{what}\['t'\] is a .*only a state may hold: send its tolist"):
        pack({"t": make()}, limit=LIMIT, what=what)


def test_the_limit_counts_the_buffers_and_names_its_setting():
    """Before anything is copied: a tensor of a terabyte would not fit into memory twice."""
    size = pack_state(torch.zeros(1000), limit=LIMIT).size
    assert 4000 < size < 4100
    with pytest.raises(
        PayloadTooLarge, match=r"state has 4,0\d\d bytes, more than the limit of 4,000 \(PERDURE_MAX_STATE\)"
    ):
        pack_state(torch.zeros(1000), limit=4000)
    with pytest.raises(PayloadTooLarge):
        pack_state(torch.zeros(1).expand(1 << 40), limit=4000)


@given(st.lists(st.integers(0, 3 * CHUNK // 2), max_size=5))
@settings(max_examples=20, deadline=None)
def test_pieces_are_the_parts_in_order(sizes):
    """All full but the last, whatever the parts; length and CRC are those of the whole."""
    whole = bytes(range(256)) * (sum(sizes) // 256 + 1)
    parts, start = [], 0
    for size in sizes:
        parts.append(memoryview(whole)[start : start + size])
        start += size
    result = Stored.of(parts)
    joined = b"".join(result.pieces)
    assert joined == whole[:start]
    assert all(len(piece) == CHUNK for piece in result.pieces[:-1])
    assert (result.length, result.crc) == (start, zlib.crc32(joined))
    assert result.chunks == (len(result.pieces) if start > CHUNK else 0)


def test_compression_is_kept_where_it_pays():
    """Zeros shrink; noise, and a state of a few bytes, are stored as they are."""
    zeros, noise = torch.zeros(100_000), torch.randint(0, 256, (100_000,), dtype=torch.uint8)
    assert len(stored(zeros, "zstd")) < 1000
    assert torch.equal(again(zeros, "zstd"), zeros)
    assert stored(noise, "zstd") == stored(noise)
    assert stored([1], "zstd") == stored([1])
    assert again(["a" * 1000], "zstd") == ["a" * 1000]


def test_a_worker_that_compresses_needs_the_library_at_start(monkeypatch: pytest.MonkeyPatch):
    """Not at its first checkpoint."""
    check_compression("none")
    check_compression("zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    check_compression("none")
    with pytest.raises(CannotRead, match=r"pip install 'perdure\[zstd\]'"):
        check_compression("zstd")


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("cut", [1, 3, 7, 100])
def test_damaged_bytes_are_a_value_error(compression, cut):
    """Cut short, whatever the form."""
    data = stored({"t": torch.zeros(1000)}, compression)
    with pytest.raises(ValueError, match="not a"):
        unpack_state(data[:-cut])


WITHOUT = """
import sys
for name in ("torch", "numpy", "zstandard"):
    sys.modules[name] = None
import perdure.producer
from perdure.protocol.packed_state import PackedState, pack_state, unpack_state
from perdure.protocol.tensors import CannotRead
assert unpack_state(b"".join(pack_state({"a": [1]}, limit=99).stored.pieces)) == {"a": [1]}
for line in sys.stdin:
    try:
        unpack_state(bytes.fromhex(line))
    except CannotRead as error:
        print(error)
"""


def test_a_missing_library_is_named():
    """It works with any other state, and imports nothing."""
    values = [(torch.ones(2), "none"), (np.ones(2), "none"), ("a" * 1000, "zstd")]
    text = "\n".join(stored(value, compression).hex() for value, compression in values)
    output = subprocess.run(
        [sys.executable, "-c", WITHOUT], input=text, check=True, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    assert [line.partition("pip install ")[2] for line in output] == ["'perdure[torch]'", "'numpy'", "'perdure[zstd]'"]


def test_a_packed_state_is_made_once():
    """A second sending is verbatim, and the captured parts are not kept beside it."""
    packed = PackedState([b"ab", memoryview(b"c")])
    assert packed.stored is packed.stored
    assert (packed.stored.pieces, packed.parts, packed.size) == ([b"abc"], [], 3)
