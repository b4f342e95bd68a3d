"""Bytes in, values out, and nothing else out."""

from __future__ import annotations

import base64
import math
import os
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given, settings

from perdure.protocol import codec
from perdure.protocol.errors import InvalidRequest, PayloadTooLarge
from tests.kit.protocol.values import VALUES


def pack(value: Any, *, limit: int = 1 << 20, what: str = "payload") -> bytes:
    return codec.pack(value, limit=limit, what=what)


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_a_value_comes_back_as_it_was(value):
    """What msgpack holds survives the way through Redis, types included."""
    again = codec.unpack(pack(value))
    assert again == value
    assert repr(again) == repr(value)


@given(VALUES)
@settings(max_examples=50, deadline=None)
def test_a_result_comes_back_as_it_was(value):
    """The same holds for results, which stand in RQ's stream as RQ writes them."""
    stored = codec.pack_result(value, limit=1 << 20)
    assert codec.unpack_result(stored.encode()) == value if stored else value is None


def test_tuples_come_back_as_lists():
    """The documented difference, and the only one."""
    assert codec.unpack(pack({"a": (1, (2,))})) == {"a": [1, [2]]}


def test_not_a_number_survives():
    """A payload with NaN is the task's to judge, not the codec's."""
    assert math.isnan(codec.unpack(pack(math.nan)))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "payload is an object"),
        ({"a": {"b": [1, {1, 2}]}}, "payload['a']['b'][1] is a set"),
        ([1, 2**64], "payload[1] is the integer 18446744073709551616"),
        ({"n": -(2**63) - 1}, "payload['n'] is the integer"),
        ({"text": "\ud800"}, "payload['text'] is text with a lone surrogate"),
        ({("a", 1): 2, "f": print}, "payload['f'] is a builtin_function_or_method"),
        ({"a": {object(): 1}}, "a key of payload['a'] is an object"),
    ],
)
def test_a_refusal_names_the_place(value, place):
    """Whoever sent a large payload is told which part of it cannot be sent."""
    with pytest.raises(InvalidRequest) as caught:
        pack(value)
    assert str(caught.value).startswith(place)
    assert caught.value.field == "payload"


def test_endless_nesting_is_refused():
    """A value that contains itself, or is too deep, is an error, not a crash."""
    value: list[object] = []
    value.append(value)
    with pytest.raises(InvalidRequest, match="nested"):
        pack(value, what="state")


def test_the_limit_is_in_packed_bytes():
    """Exactly the limit passes; one byte more is refused, with both numbers and a way out."""
    size = len(pack(b"x" * 1000))
    assert pack(b"x" * 1000, limit=size)
    with pytest.raises(PayloadTooLarge, match=r"output has 1,003 bytes, more than the limit of 1,002.*reference"):
        pack(b"x" * 1000, limit=size - 1, what="output")
    with pytest.raises(PayloadTooLarge):
        codec.pack_result("x" * 1000, limit=100)


@pytest.mark.parametrize("data", [b"", b"\xc1", pack([1, 2])[:-1], pack(1) + b"\x00", b"\xa3\xff\xfe\xfd"])
def test_damaged_bytes_are_a_value_error(data):
    """What is no msgpack value raises one kind of error, whatever is wrong with it."""
    with pytest.raises(ValueError, match="not a msgpack value"):
        codec.unpack(data)


class Hostile:
    """What an attacker with access to Redis would store."""

    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_without_running(protocol, tmp_path, monkeypatch):
    """Nothing that stands in Redis can make us import or call anything."""
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Hostile(), protocol=protocol)
    with pytest.raises(pickle.UnpicklingError, match="refused to import"):
        codec.RestrictedPickle.loads(data)
    with pytest.raises(ValueError, match="refused to import"):
        codec.unpack_result(base64.b64encode(data))
    assert list(tmp_path.iterdir()) == []
    pickle.loads(data)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile-was-here"]


@pytest.mark.parametrize("data", [b"", b"!", base64.b64encode(b"\x80\x05garbage"), base64.b64encode(b"I")])
def test_a_damaged_result_is_a_value_error(data):
    """Damage is told apart from a result of None."""
    with pytest.raises(ValueError, match="not a result"):
        codec.unpack_result(data)


def test_the_envelope_is_a_call_as_rq_stores_it():
    """RQ's tools read which task it is; the pickle holds nothing but strings."""
    function, instance, arguments, named = codec.RestrictedPickle.loads(
        zlib.decompress(codec.envelope("app.wrong_worker", "app.tasks.count"))
    )
    assert (function, instance, arguments, named) == ("app.wrong_worker", None, ("app.tasks.count",), {})


def test_a_traceback_survives_whatever_text_it_holds():
    """Also a lone surrogate in a message, which UTF-8 cannot hold."""
    assert codec.unpack_exception(codec.pack_exception("two\nlines ü").encode()) == "two\nlines ü"
    assert codec.unpack_exception(codec.pack_exception("a \ud800 b").encode()) == "a ? b"
    with pytest.raises(ValueError, match="not a stored traceback"):
        codec.unpack_exception(b"AAAA")
