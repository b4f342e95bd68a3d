"""Where a newcomer stumbles: what is said, and where it is found out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from perdure.producer import AsyncClient, Client
from perdure.protocol.codec import article, pack
from perdure.protocol.errors import InvalidRequest, RedisUnavailable
from perdure.protocol.settings import Settings
from perdure.scripts.present.console import fitted
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool

PERDURE = Path(sys.executable).with_name("perdure")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PERDURE, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(("word", "meant"), [("lsit", "list"), ("worker-s", "workers"), ("submitt", "submit")])
def test_a_command_that_is_none_is_guessed(word: str, meant: str) -> None:
    done = call(word)
    assert done.returncode == 2
    assert f"Did you mean {meant}?" in done.stderr


def test_a_command_that_is_like_none_is_not() -> None:
    assert "Did you mean" not in call("xyzzy").stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_failure(redis_url: str, pool: Pool) -> None:
    """``perdure … | head``: whatever is printed, and however."""
    for name in range(300):
        pool.submit(f"r{name}")
    for command in (["list", "--limit", "300"], ["list", "--limit", "300", "--json"], ["config", "show"]):
        line = (
            f"{PERDURE} {' '.join(command)} --url {redis_url}"
            if command[0] == "list"
            else f"{PERDURE} {' '.join(command)}"
        )
        done = subprocess.run(
            ["bash", "-c", f"{line} | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"],
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b""), command


def test_a_task_without_a_payload_needs_no_json(redis_url: str, pool: Pool) -> None:
    done = call("submit", "app.tasks.count", "--queue", "gpu", "--url", redis_url)
    assert done.returncode == 0
    assert Hand(pool).take(done.stdout.strip()).payload == pack({}, limit=9, what="payload")


def test_a_database_that_the_server_lacks_is_told(redis_url: str) -> None:
    """To the command, and to both clients, at once."""
    url = f"{redis_url.rpartition('/')[0]}/99"
    done = call("list", "--url", url)
    assert done.returncode == 3
    assert "has no database of this number" in done.stderr
    with Client(url) as client, pytest.raises(RedisUnavailable, match="no database of this number"):
        client.submit("app.tasks.count", {})


async def _asynchronously(url: str) -> None:
    async with AsyncClient(url) as client:
        await client.submit("app.tasks.count", {})


def test_it_is_told_on_an_event_loop_too(redis_url: str) -> None:
    import asyncio

    with pytest.raises(RedisUnavailable, match="no database of this number"):
        asyncio.run(_asynchronously(f"{redis_url.rpartition('/')[0]}/99"))


def test_none_waits_as_long_as_it_takes(redis_url: str, pool: Pool) -> None:
    """And nothing takes the setting, as before; what is said names the way to wait longer, each in its own language."""
    hand = Hand(pool)
    with Client(redis_url, settings=Settings(response_timeout=0.2)) as client:
        handle = client.submit("app.tasks.count", {}, queue="gpu")
        for ask in (handle.result, handle.exception, lambda: next(handle.stream())):
            with pytest.raises(TimeoutError, match=r"within 0\.2 s|for 0\.2 s") as late:
                ask()
            assert "timeout=SECONDS" in str(late.value)
        assert not handle.wait()
        results: list[Any] = []
        waiting = threading.Thread(target=lambda: results.append(handle.result(None)))
        waiting.start()
        waiting.join(0.6)
        assert waiting.is_alive(), "three times as long as the setting says"
        hand.finish(hand.take(handle.id))
        waiting.join()
        eventually(lambda: results)
    done = call("submit", "app.tasks.count", "--queue", "gpu", "--wait", "--timeout", "0.1", "--url", redis_url)
    assert done.returncode == 4
    assert "perdure result " in done.stderr
    assert "--timeout SECONDS" in done.stderr
    assert "result(" not in done.stderr


@pytest.mark.parametrize(("value", "told"), [(object(), "is an object"), ({1}, "is a set"), (1j, "is a complex")])
def test_what_cannot_be_packed_has_its_article(value: object, told: str) -> None:
    for what in ("output", "payload", "state"):
        with pytest.raises(InvalidRequest, match=f"{told}; {article(what)} holds"):
            pack([value], limit=9, what=what)


def test_a_table_fits_into_its_terminal() -> None:
    """The widest columns give way, and no header does."""
    assert fitted([10, 30, 8], [4, 6, 8], 80) == [10, 30, 8]
    assert sum(fitted([10, 30, 8], [4, 6, 8], 40)) + 4 == 40
    assert fitted([10, 30, 8], [4, 6, 8], 10) == [4, 6, 8]


def test_a_table_on_a_narrow_terminal_is_no_wider(redis_url: str, pool: Pool) -> None:
    import pty

    pool.submit("a-request-with-a-long-name-" + "x" * 60)
    ours, theirs = pty.openpty()
    subprocess.run(
        [PERDURE, "list", "--url", redis_url],
        stdout=theirs,
        check=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "60"},
    )
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "…" in text
    assert max(map(len, re.sub(r"\x1b\[\d+m", "", text).splitlines())) <= 60


def test_a_worker_says_which_release_it_is(lab: Lab) -> None:
    """RQ's own line names RQ's version."""
    assert f"Perdure {version('perdure')}; the version above is RQ's" in lab.worker().log
