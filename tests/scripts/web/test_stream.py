"""``perdure web`` as a process: its stream of frames, outages of Redis, beginning and end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.protocol.errors import RedisUnavailable
from perdure.scripts.main import main
from perdure.scripts.pool.server import Server
from perdure.scripts.web.stream import MOST, Broadcast
from tests.kit.lab import eventually
from tests.kit.protocol.pool import Pool
from tests.kit.scripts.web import TOKEN, serving

# --- the stream --------------------------------------------------------------------------------------------


def test_many_viewers_cost_as_much_as_one():
    """The reader begins with the first and ends after the last; who is slow misses frames and delays nobody."""
    looks = 0

    def look() -> dict[str, Any]:
        nonlocal looks
        looks += 1
        return {"at": float(looks), "queues": [], "server": {"memory": {"used": looks}}}

    async def view(watch: Broadcast, frames: int) -> list[bytes]:
        async with aclosing(watch.events()) as events:
            return [await anext(events) for _ in range(frames + 1)]

    async def run() -> None:
        watch = Broadcast(look, 0.01)
        alone = await view(watch, 5)
        assert alone[0].startswith(b"retry: 2000\nevent: history\n")
        for _ in range(3):
            before, frames = looks, await asyncio.gather(*(view(watch, 5) for _ in range(20)))
            assert all(found[1:] == frames[0][1:] for found in frames)
            # The first frame may be the last one's, and a look may be under way when the last viewer leaves.
            assert 4 <= looks - before <= 8
        slow = aclosing(watch.events())
        async with slow as events:
            await anext(events)
            assert len(await view(watch, 5)) == 6
            first, second = await anext(events), await anext(events)
            assert first != second
        assert watch._task is not None
        await asyncio.wait_for(watch._task, 30)
        assert (watch.viewers, watch.full) == (0, False)
        watch.close()
        assert watch.full

    asyncio.run(run())


def test_a_pool_that_cannot_be_seen_is_a_frame_too():
    """It says since when; an error that nobody has foreseen ends no stream."""
    answers: list[Any] = [
        RedisUnavailable("gone"),
        ArithmeticError("a bug"),
        {"at": 1.0, "queues": [], "server": {"memory": {"used": 1}}},
    ]

    def look() -> dict[str, Any]:
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        found: dict[str, Any] = answer
        return found

    async def run() -> list[Any]:
        watch = Broadcast(look, 0.01)
        async with aclosing(watch.events()) as events:
            found = [await anext(events) for _ in range(4)][1:]
        watch.close()
        return [json.loads(data.partition(b"data: ")[2]) for data in found]

    gone, bug, back = asyncio.run(run())
    assert gone["away"]["reason"] == "gone"
    assert (bug["away"]["since"], "log" in bug["away"]["reason"]) == (gone["away"]["since"], True)
    assert "away" not in back


def test_there_are_places_for_so_many(redis_url: str, tmp_path: Path):
    """A further viewer is told to come again; one that leaves makes room."""
    with serving(redis_url, tmp_path) as site, ExitStack() as places:
        for _ in range(MOST):
            name, _history = next(places.enter_context(site.watching()))
            assert name == "history"
        answer = site.ask("/api/stream")
        assert (answer.status, answer.headers["retry-after"]) == (503, "10")
        assert site.ask("/api/overview").status == 200
        places.close()
        eventually(lambda: site.ask("/api/stream", "HEAD").status == 200)


# --- the process -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_outlives_redis_and_ends_when_it_is_told_to(server_binary: Path, tmp_path: Path):
    """Away: 503 with words, and a frame that says since when. Back: all goes on. SIGTERM ends it under a stream."""
    with Server(binary=server_binary, die_with_parent=True) as server:
        with redis.Redis.from_url(server.url) as connection:
            Pool.over(connection).submit("a")
        with serving(server.url, tmp_path, "--every", "0.2") as site, site.watching() as events:
            assert next(events) == ("history", [])
            assert next(events)[1]["queues"][0]["waiting"] == 1
            server.kill()
            away = next(frame["away"] for _, frame in events if "away" in frame)
            assert "Cannot reach Redis" in away["reason"]
            for path in ("/api/overview", "/api/requests", "/api/requests/a", "/api/dead-letters"):
                answer = site.ask(path)
                assert (answer.status, "connection" in answer.error) == (503, True), answer
            assert (site.ask("/livez").status, site.ask("/").status) == (200, 200)
            assert site.requeue({"id": "a", "queue": "gpu"}).status == 503
            server.restart()
            back = next(frame for _, frame in events if "away" not in frame)
            assert back["queues"][0]["waiting"] == 1
            assert site.get("/api/requests/a")["status"] == "queued"
            site.process.send(signal.SIGTERM)
            assert site.process.end() == 0
            assert "Traceback" not in site.process.log


def test_what_it_cannot_begin_with_is_one_line(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A port that is taken, a token that is too short or cannot be read: exit code 2, and no token is printed."""
    short = tmp_path / "short"
    short.write_text("s3cret\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        mistakes = [
            (("--port", str(taken.getsockname()[1])), "in use; choose another with --host or --port"),
            (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1"),
            (("--token-file", str(short)), "16 characters or more"),
            (("--token-file", str(tmp_path / "none")), "No such file"),
        ]
        for arguments, words in mistakes:
            assert main(["web", "--url", redis_url, *arguments]) == 2
            error = capsys.readouterr().err
            assert (len(error.splitlines()), words in error, "s3cret" in error) == (1, True, False), error
    monkeypatch.setenv("PERDURE_WEB_TOKEN", "s3cret")
    assert main(["web", "--url", redis_url]) == 2
    assert "PERDURE_WEB_TOKEN must have 16 characters" in capsys.readouterr().err
    assert main(["list", "--url", redis_url]) == 0, "it is no setting, and no mistake"


@pytest.mark.slow
def test_beyond_this_machine_it_warns(redis_url: str, tmp_path: Path):
    """Only with --host; then any name is its own unless one is given. Ctrl-C is an end in order."""
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    with serving(redis_url, tmp_path, "--host", "0.0.0.0", "--token-file", str(token), token="") as site:
        assert "everybody who can connect" in site.process.log
        assert site.ask("/api/about", Host="pool.example.org").value["writable"]
        site.process.send(signal.SIGINT)
        assert site.process.end() == 0
    assert TOKEN not in site.process.log
