"""``perdure web`` without a browser: what it answers, to whom, and what it costs Redis."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from perdure.producer.reading.listing import Wanted
from perdure.protocol.codec import unpack
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.protocol.settings import Settings
from perdure.scripts.main import main
from perdure.scripts.pool.server import Server
from perdure.scripts.present.reading import Rates
from perdure.scripts.web.access import HEADERS, Access, name_of
from perdure.scripts.web.looks import WebQueries
from tests.kit.hands import Hands
from tests.kit.lab import Process, eventually
from tests.kit.places import DOCS
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.scripts.web import TOKEN, Site, serving


@pytest.fixture(scope="module")
def served(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One server for all tests here."""
    with serving(server.url, tmp_path_factory.mktemp("web")) as running:
        yield running


@pytest.fixture
def site(served: Site, pool: Pool) -> Site:
    """The same on an empty Redis, without a memory of the test before."""
    assert served.requeue().value == {"requeued": [], "left": []}
    return served


def fail(pool: Pool, *names: str, reason: str = "it broke") -> None:
    """Requests that fail for good."""
    hand = Hand(pool, f"of-{names[0]}")
    hand.beat()
    pool.submit(*names, retries=0)
    for name in names:
        assert hand.fail(hand.take(name), FailureKind.UNKNOWN, reason) == "failed"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- what is told ------------------------------------------------------------------------------------------


def test_the_server_tells_what_the_commands_tell(
    site: Site, pool: Pool, redis_url: str, capsys: pytest.CaptureFixture[str]
):
    """The same items with the same fields: requests, one request, failures by error, and each failure."""
    fail(pool, "a", "b", reason="page 7 of 'x' has no text")
    pool.submit("c")
    where = ("--url", redis_url)
    assert site.get("/api/requests")["items"] == told(capsys, "list", *where)["items"]
    shown, page = told(capsys, "show", "a", *where), site.get("/api/requests/a")
    assert {name: page[name] for name in shown if name != "meta"} == {
        name: value for name, value in shown.items() if name != "meta"
    }
    assert (page["meta"], [bar["shape"] for bar in page["chart"]["bars"]]) == ("{}", ["waiting", "failed"])
    groups = site.get("/api/dead-letters")
    assert groups == {**told(capsys, "dead-letters", *where), "left_out": 0}
    (group,) = groups["items"]
    assert group["number"] == 2
    letters = site.get(f"/api/dead-letters/{group['error']}")
    assert letters["items"] == told(capsys, "dead-letters", "--ids", *where)["items"]
    frame = site.get("/api/overview")
    (queue,) = frame["queues"]
    assert (queue["waiting"], queue["failed"], frame["mode"]["degraded"]) == (1, 2, False)
    assert {worker["name"] for worker in frame["workers"]} == {"of-a"}
    assert frame["server"]["memory"]["policy"] == "noeviction"
    drawing = site.ask("/api/requests/a/timeline.svg")
    assert drawing.body.startswith(b"<svg")
    assert drawing.headers["content-disposition"] == 'attachment; filename="a.svg"'


def test_lists_hold_no_payload_and_go_on_page_by_page(site: Site, pool: Pool):
    fail(pool, *(f"f{number}" for number in range(5)))
    pool.submit(*(f"r{number}" for number in range(5)))
    pool.connection.hset(key("job", "r0"), "data", b"s3cret")
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = site.get(f"/api/requests?limit=3&cursor={cursor}")
        seen += [item["id"] for item in page["items"]]
        cursor = page["cursor"]
        assert "s3cret" not in json.dumps(page)
    assert sorted(seen) == sorted([f"{kind}{number}" for kind in "rf" for number in range(5)])
    assert [item["id"] for item in site.get("/api/requests?status=queued&queue=gpu")["items"]] == seen[:5]
    error = site.get("/api/dead-letters")["items"][0]["error"]
    first = site.get(f"/api/dead-letters/{error}?limit=3")
    second = site.get(f"/api/dead-letters/{error}?limit=3&cursor={first['cursor']}")
    assert (first["number"], len(first["items"]), len(second["items"]), second["cursor"]) == (5, 3, 2, None)


def test_the_cost_of_a_look_does_not_grow_with_requests(pool: Pool, redis_url: str):
    """And none of them is one that walks through what waits."""

    def commands() -> dict[str, int]:
        pool.connection.config_resetstat()
        with WebQueries(Settings(), redis_url) as looks:
            looks.frame(Rates())
            looks.listing(20, None, status=None, queue=None, wanted=Wanted())
        stats: Any = pool.connection.info("commandstats")
        return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}

    pool.submit(*(f"r{number}" for number in range(40)))
    few = commands()
    for begin in range(0, 5000, 500):
        pool.submit(*(f"x{number}" for number in range(begin, begin + 500)))
    many = commands()
    assert many == few
    assert not {"keys", "scan", "zscan", "hscan"} & {name.partition("|")[0] for name in many}
    assert sum(many.values()) < 100


def test_what_is_quarantined_and_not_used_is_told(site: Site, pool: Pool):
    """As a supervisor and a worker write it."""
    places = [
        {"place": "gpu0", "phase": "quarantined", "reason": "Xid 79", "device": "cuda:0"},
        {"place": "gpu1", "phase": "ready"},
    ]
    record = {"host": "node-7", "pid": 1, "release": "kill -USR1 1", "places": places}
    pool.connection.sadd(key("supervisors"), "up-1")
    pool.connection.set(key("supervisor", "up-1"), json.dumps(record))
    pool.connection.hset(key("unfit"), "node-7 cuda:0", "1000\tcuda:0\tnode-7\tw1\tXid 79")
    frame = site.get("/api/overview")
    (place,) = frame["quarantined"]
    assert (place["place"], place["host"], place["reason"], place["release"]) == (
        "gpu0",
        "node-7",
        "Xid 79",
        "kill -USR1 1",
    )
    assert frame["unfit"] == [{"device": "cuda:0", "host": "node-7", "worker": "w1", "at": 1.0, "reason": "Xid 79"}]


MISTAKES = [
    ("/api/requests?cursor=%21", 400, "cursor"), ("/api/requests?cursor=eA", 400, "cursor"),
    ("/api/requests?status=lost", 400, "status is one of"), ("/api/requests?limit=0", 400, "limit is a number from 1"),
    ("/api/requests?limit=1e9", 400, "limit"), ("/api/requests?queue=" + "x" * 501, 400, "queue"),
    ("/api/dead-letters/x?cursor=-1", 400, "cursor"), ("/api/requests/nobody", 404, "nobody"),
    ("/api/requests/a%3Ab", 400, "id"), ("/api/nothing", 404, "/api/nothing"), ("/static/../api.py", 404, "nothing"),
    ("/static/%2e%2e%2fapi.py", 404, "nothing"), ("/api/requeue", 405, "GET"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "status", "words"), MISTAKES, ids=[item[0] for item in MISTAKES])
def test_what_cannot_be_asked_is_told_in_words(site: Site, pool: Pool, path: str, status: int, words: str):
    answer = site.ask(path)
    assert answer.status == status
    assert words in answer.error


def test_every_answer_tells_the_browser_what_to_refuse(site: Site, pool: Pool):
    """Success and failure, page and file, HEAD too; and the policy allows nothing inline and nothing from elsewhere."""
    asked = [
        ("/", "GET"), ("/", "HEAD"), ("/static/main.js", "GET"), ("/static/style.css", "GET"), ("/livez", "GET"),
        ("/api/about", "GET"), ("/api/overview", "GET"), ("/api/nothing", "GET"), ("/api/requests?limit=x", "GET"),
        ("/api/requests", "DELETE"), ("/api/requeue", "POST"), ("/api/stream", "HEAD"),
    ]  # fmt: skip
    for path, method in asked:
        answer = site.ask(path, method)
        assert {name: answer.headers.get(name.lower()) for name in HEADERS} == HEADERS, (path, method)
        assert answer.headers["cache-control"] in ("no-store", "no-cache"), path
    assert site.ask("/api/requests", "DELETE").status == 405
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    page = site.ask("/").body.decode()
    assert " style=" not in page
    assert "<script>" not in page
    tag = site.ask("/static/main.js").headers["etag"]
    assert site.ask("/static/main.js", **{"If-None-Match": tag}).status == 304


# --- who may ask -------------------------------------------------------------------------------------------


def test_a_server_on_this_machine_goes_by_its_names_only(site: Site, pool: Pool):
    """A page whose name was made to lead here (DNS rebinding) is refused; a tunnel's other port is not."""
    for host in (f"127.0.0.1:{site.port}", "localhost", "LOCALHOST.:8080", "[::1]:80"):
        assert site.ask("/api/about", Host=host).status == 200, host
    for host in ("evil.example", f"evil.example:{site.port}", "127.0.0.1.evil.example", "", "[::2]"):
        answer = site.ask("/api/about", Host=host)
        assert (answer.status, "--allow-host" in answer.error) == (403, True), host
        assert answer.headers["content-security-policy"]


def test_names_are_compared_without_port_and_case():
    assert [name_of(host) for host in ("A.b:1", "[::1]:2", "[::1]", "a.", " x ")] == ["a.b", "::1", "::1", "a", "x"]
    behind = Access("", ["Pool.Example.org"], local=True)
    assert [behind.knows(host) for host in ("pool.example.org:443", "localhost", "other")] == [True, True, False]
    assert Access("", [], local=False).knows("anything")
    assert not Access("", ["pool.example.org"], local=False).knows("anything")


def test_only_the_token_requeues(site: Site, pool: Pool):
    """Nothing, a wrong one, one in the query or in a form: nothing is changed. With it, each failure goes back once."""
    fail(pool, "a", "b")
    items = [{"id": "a", "queue": "gpu"}, {"id": "b", "queue": "gpu"}]
    for answer in (
        site.requeue(*items, token="wrong"),
        site.requeue(*items, token=""),
        site.requeue(*items, token=TOKEN + "x"),
        site.ask("/api/requeue", "POST", {"items": items}),
        site.ask(f"/api/requeue?token={TOKEN}", "POST", {"items": items}),
        site.ask("/api/requeue", "POST", f"token={TOKEN}".encode(), Cookie=f"token={TOKEN}"),
        site.ask("/api/token", "POST", Authorization=f"Basic {TOKEN}"),
    ):
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert pool.waiting() == []
    assert site.ask("/api/token", "POST", Authorization=f"Bearer {TOKEN}").status == 204
    assert site.requeue(*items[:1], {"id": "c", "queue": "gpu"}).value == {"requeued": ["a"], "left": ["c"]}
    assert site.requeue(*items).value == {"requeued": ["b"], "left": ["a"]}
    assert sorted(pool.waiting()) == ["a", "b"]
    assert site.get("/api/dead-letters")["items"] == []
    assert "requeued 1 of 2: b" in site.process.log
    assert TOKEN not in site.process.log


def test_requests_are_filtered(site: Site, pool: Pool, connection: redis.Redis):
    """By task, text and age besides; what cannot be is named."""
    fail(pool, "alpha", reason="Disk 7 is full")
    pool.submit("beta", task="app.tasks.other")
    connection.hset(key("job", "beta"), "created_at", "2020-01-01T00:00:00.000000Z")

    def found(query: str) -> list[str]:
        return [item["id"] for item in site.get(f"/api/requests?{query}")["items"]]

    assert found("") == ["beta", "alpha"]
    assert [found(f"task={task}") for task in ("app.tasks.other", "app.tasks")] == [["beta"], []]
    assert [found(f"text={text}") for text in ("ALPH", "disk+7", "tasks.other", "nowhere")] == [
        ["alpha"], ["alpha"], ["beta"], [],
    ]  # fmt: skip
    assert [found("within=3600"), found("within=3600&task=app.tasks.other")] == [["alpha"], []]
    assert site.ask("/api/requests?within=0").status == 400


def post(site: Site, path: str, body: Any = None, token: str = TOKEN) -> Any:
    return site.ask(path, "POST", body, Authorization=f"Bearer {token}")


def test_only_the_token_reads_contents_and_cancels(site: Site, pool: Pool):
    pool.submit("a", "b")
    Hand(pool, "w").beat()
    for path in ("/api/requests/a/contents", "/api/requests/a/cancel"):
        assert (post(site, path, {}, "wrong").status, site.ask(path, "POST").status, site.ask(path).status) == (
            401,
            401,
            405,
        )
        assert post(site, path.replace("/a/", "/nobody/"), {}).status == 404
    assert pool.status("a") == "queued"
    assert post(site, "/api/requests/a/cancel", {"reason": 7}).status == 400
    assert post(site, "/api/requests/a/cancel", {"reason": "why"}).value == {"canceled": True}
    assert (pool.status("a"), pool.status("b")) == ("canceled", "queued")
    assert "why" in json.dumps(site.get("/api/requests/a")["history"])
    assert post(site, "/api/requests/a/cancel", {}).value == {"canceled": True}  # as Handle.cancel says it


def test_contents_are_text_and_cut(site: Site, pool: Pool, connection: redis.Redis):
    """Payload, outputs and result; what is too large or damaged is said and not sent."""
    hands = Hands(connection)
    pool.submit("a", queue="default")
    assert post(site, "/api/requests/a/contents").value["outputs"] is None
    claim = hands.one()
    hands.put(claim, 0, "é", b"\xff", "x" * 70_000)
    told = post(site, "/api/requests/a/contents").value
    assert json.loads(told["payload"]) == unpack(pool.new("a").payload)
    assert (told["first"], told["result"]) == (0, None)
    assert told["outputs"].startswith('[\n "é",\n {\n  "base64": "/w=="\n }')
    assert told["outputs"].endswith("more characters)")
    assert len(told["outputs"]) < 66_000
    hands.finish(claim, 3, {"sum": 6})
    assert json.loads(post(site, "/api/requests/a/contents").value["result"]) == {"sum": 6}
    connection.hset(key("job", "a"), "payload", b"\xc1")
    assert post(site, "/api/requests/a/contents").value["payload"].startswith("cannot be read: ")
    connection.hset(key("job", "a"), "payload", b"\0" * (1 << 20) + b"\0")
    assert post(site, "/api/requests/a/contents").value["payload"] == "1,048,577 bytes: too large to be shown here"


def test_the_end_of_a_long_log_is_read(site: Site, pool: Pool, connection: redis.Redis):
    """Twenty entries at most, and from them only those of the newest run."""
    hands = Hands(connection)
    pool.submit("a", queue="default")
    claim = hands.one()
    for number in range(30):
        hands.put(claim, number, number)
    told = post(site, "/api/requests/a/contents").value
    assert (told["first"], json.loads(told["outputs"])) == (10, list(range(10, 30)))
    hands.put(hands.restart(claim), 0, {"token": 1, "text": "ein "}, {"token": 2, "text": "Wort"})
    told = post(site, "/api/requests/a/contents").value
    assert (told["first"], told["outputs"]) == (0, "ein Wort")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "no JSON"), ([], 400, "items"), ({"items": [{"id": "a"}]}, 400, "queue"),
        ({"items": [{"id": "a b", "queue": "gpu"}]}, 400, "id"), ({"items": [7]}, 400, "id"),
        ({"items": [{"id": "a", "queue": "gpu"}] * 101}, 400, "at most 100"), (b"x" * 70_000, 413, "bytes"),
    ],
    ids=["json", "list", "queue", "id", "number", "many", "long"],
)  # fmt: skip
def test_a_body_is_checked_before_anything_is_done(site: Site, pool: Pool, body: Any, status: int, words: str):
    fail(pool, "a")
    answer = site.ask("/api/requeue", "POST", body, Authorization=f"Bearer {TOKEN}")
    assert (answer.status, words in answer.error) == (status, True), answer
    assert pool.status("a") == "failed"


@pytest.mark.slow
def test_a_viewer_of_redis_may_serve_it_read_only(pool: Pool, redis_url: str, tmp_path: Path):
    """Without a token nothing is changed; with one, Redis refuses this user, and the page says so."""
    fail(pool, "a")
    page = (DOCS / "security.md").read_text(encoding="utf-8")
    (rule,) = [line for line in page.splitlines() if line.startswith("ACL SETUSER perdure-viewer")]
    pool.connection.execute_command(*rule.replace(">VIEWER-PASSWORD", ">s3cret").split())  # type: ignore[no-untyped-call]
    try:
        url = redis_url.replace("://", "://perdure-viewer:s3cret@")
        with serving(url, tmp_path, token="") as site:
            assert site.get("/api/about")["writable"] is False
            answer = site.requeue({"id": "a", "queue": "gpu"})
            assert (answer.status, "read-only" in answer.error) == (403, True)
        with serving(url, tmp_path) as site:
            frame = site.get("/api/overview")
            assert (frame["queues"][0]["failed"], frame["server"]["memory"]["used"]) == (1, None)
            assert site.get("/api/requests/a")["status"] == "failed"
            answer = site.requeue({"id": "a", "queue": "gpu"})
            assert (answer.status, "has no permission to do that" in answer.error) == (403, True)
            pool.connection.acl_setuser(
                "perdure-viewer", enabled=True, commands=["+info", "+config|get", "+slowlog|get"]
            )
            eventually(lambda: site.get("/api/overview")["server"]["memory"]["used"])
            assert site.get("/api/overview")["server"]["persistence"]["fsync"]
            assert "s3cret" not in site.process.log + json.dumps(site.get("/api/about"))
        assert pool.status("a") == "failed"
    finally:
        pool.connection.acl_deluser("perdure-viewer")


# --- the docs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_docs_say_works(pool: Pool, redis_url: str, tmp_path: Path):
    """Each command that starts it starts it, each question of a program is answered; nothing else is shown as a
    command.
    """
    page = (DOCS / "web.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ (.+)$", "".join(blocks), re.MULTILINE)
    starts = [command for command in commands if "perdure web" in command]
    questions = [command for command in commands if command.startswith("curl -s ")]
    others = [command for command in commands if command not in [*starts, *questions]]
    assert others == ['pip install "perdure[web]"', "openssl rand -hex 16 > token"]
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    fail(pool, "REQUEST")
    for command in starts:
        shown = "read-only" if "token" not in command.lower() else "with a token"
        real = command.replace("perdure web", f"exec {sys.executable} -m perdure.scripts.main web")
        real = f"{real.replace('redis://localhost:6379', redis_url)} --port 0"
        output = tmp_path / "web.log"
        with output.open("wb") as file:
            environment = {**os.environ, "PERDURE_REDIS_URL": redis_url}
            started = subprocess.Popen(["bash", "-c", real], cwd=tmp_path, stdout=file, stderr=file, env=environment)
        process = Process(started, output)
        try:
            eventually(lambda process=process: "serving" in process.log or not process.running)  # type: ignore[misc]
            assert f"of {redis_url}, {shown}" in process.log, process.log
            port = re.findall(r"127\.0\.0\.1:(\d+) of", process.log)[0]
            for question in questions if "file" in command else ():
                path, method, body, headers = asked(question.replace("TOKEN", TOKEN))
                answer = Site(f"http://127.0.0.1:{port}", process).ask(path, method, body, **headers)
                assert answer.status == 200, (question, answer)
        finally:
            process.kill()
    assert pool.status("REQUEST") == "queued"


def asked(command: str) -> tuple[str, str, bytes | None, dict[str, str]]:
    """What curl would ask: path, method, body and headers."""
    words = shlex.split(command)
    url = next(word for word in words if word.startswith("localhost:9728/"))
    body = words[words.index("-d") + 1].encode() if "-d" in words else None
    headers = [words[at + 1].partition(": ") for at, word in enumerate(words) if word == "-H"]
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    return url.removeprefix("localhost:9728"), method, body, {name: text for name, _, text in headers}
