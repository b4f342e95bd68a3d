"""Connecting: bounded, without retries, and with errors that tell a person what to do and no password."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Iterator

import pytest
import redis

from perdure.protocol.connection import connect, state_folders
from perdure.protocol.errors import RedisUnavailable, SettingsError
from perdure.protocol.transport.explaining import explain


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_refused_connection_says_where_why_and_what_next(closed_port: int) -> None:
    with pytest.raises(RedisUnavailable) as caught:
        connect(f"redis://127.0.0.1:{closed_port}")
    assert str(caught.value) == (
        f"Cannot reach Redis at redis://127.0.0.1:{closed_port} (connection refused). "
        'Start one with "perdure up QUEUE" or set PERDURE_REDIS_URL.'
    )


def test_a_server_that_never_answers_is_given_up(silent_port: int) -> None:
    """Connecting works, and no reply comes: a stopped process, a firewall, another protocol."""
    begin = time.monotonic()
    with pytest.raises(RedisUnavailable, match="no answer in time"):
        connect(f"redis://127.0.0.1:{silent_port}", timeout=0.2)
    assert time.monotonic() - begin < 2


def test_a_connection_that_is_closed_at_once_is_explained() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        closer = threading.Thread(target=lambda: listener.accept()[0].close())
        closer.start()
        with pytest.raises(RedisUnavailable, match="clos"):
            connect(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout=5)
        closer.join()


def test_an_unknown_host_and_a_missing_socket_are_explained() -> None:
    with pytest.raises(RedisUnavailable, match="name of the host is unknown"):
        connect("redis://no-such-host.invalid")
    with pytest.raises(RedisUnavailable, match="no such socket"):
        connect("unix:///nowhere/redis.sock")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "must begin with"),
        ("127.0.0.1:6379", "must begin with"),
        ("http://127.0.0.1", "must begin with"),
        ("redis:/127.0.0.1", "must begin with"),
        ("redis://", "names no host"),
        ("redis://:secret@", "names no host"),
        ("redis://host:0", "port 0"),
        ("redis://host:port", "port is no number"),
        ("redis://host:70000", "port is no number"),
        ("redis://[::1", "cannot be read"),
        ("redis://host/first", "number of a database"),
        ("redis://host?db=first", "db"),
        ("redis://host?decode_responses=1", "decode_responses"),
        ("redis://host?retry_on_timeout=1", "retry_on_timeout"),
        ("redis://host?unknown_option=1", "unknown_option"),
        ("unix://", "names no socket"),
        ("redis://:secret#more@host", "escaped"),
        ("redis://:secret/more@host", "escaped"),
        ("redis://:secret?more@host", "escaped"),
        ("redis://user:6379/secret@host", "escaped"),
        ("redis://user:6379#secret@host", "escaped"),
    ],
)
def test_a_bad_url_is_a_settings_error_that_shows_no_password(url: str, message: str) -> None:
    """Also where the password itself is what makes the URL unreadable."""
    with pytest.raises(SettingsError, match=message) as caught:
        connect(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "form", ["redis://nobody:hunter%2F2@127.0.0.1:{}", "redis://127.0.0.1:{}?username=nobody&password=hunter%2F2"]
)
def test_no_error_prints_the_password(closed_port: int, connection: redis.Redis, form: str) -> None:
    """Neither when nobody listens nor when the server refuses it."""
    port = connection.connection_pool.connection_kwargs["port"]
    for number, reason in [(closed_port, "connection refused"), (port, "password is wrong")]:
        with pytest.raises(RedisUnavailable, match=reason) as caught:
            connect(form.format(number))
        assert "hunter" not in "".join(traceback.format_exception(caught.value))


def test_an_error_that_quotes_the_password_is_scrubbed() -> None:
    error = redis.ConnectionError("cannot use open sesame here\nmore")
    shown = str(explain(error, "redis://:open%20sesame@host"))
    assert "sesame" not in shown
    assert "cannot use *** here" in shown
    assert "more" not in shown


def test_a_loading_server_is_not_taken_for_a_missing_one() -> None:
    shown = str(explain(redis.BusyLoadingError("LOADING"), "redis://host"))
    assert "still loading" in shown
    assert "perdure up" not in shown


def test_replies_are_bytes_and_the_client_has_a_name(redis_url: str) -> None:
    with connect(redis_url, name="perdure-somebody") as client:
        client.set("key", "value")
        assert client.get("key") == b"value"
        assert client.client_getname() in (b"perdure-somebody", "perdure-somebody")


def test_a_call_is_never_sent_twice(silent_port: int) -> None:
    """The caller alone knows whether it may be."""
    with connect(f"redis://127.0.0.1:{silent_port}", timeout=0.2, check=False) as client:
        begin = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            client.incr("counter")
        assert time.monotonic() - begin < 1


def test_unix_sockets_and_databases_work(connection: redis.Redis, redis_url: str) -> None:
    with connect(redis_url.removesuffix("/0") + "/3") as client:
        client.set("key", "value")
    assert connection.get("key") is None


def test_the_record_of_a_server_lies_under_the_state_home_first() -> None:
    assert str(state_folders({"XDG_STATE_HOME": "/x", "HOME": "/h"})[0]) == "/x/perdure"
    assert str(state_folders({"HOME": "/h"})[0]) == "/h/.local/state/perdure"
    assert len(state_folders({})) == 1
    assert len(state_folders({"XDG_STATE_HOME": "relative"})) == 1
