"""The page in a real browser: what a person sees, does, and is spared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from perdure.protocol.connection import connect
from perdure.protocol.keys import key
from perdure.protocol.records import FailureKind
from perdure.scripts.pool.server import Server
from tests.kit.lab import Lab, eventually
from tests.kit.protocol.pool import Hand, Pool
from tests.kit.scripts.browser import BINARY, Browser, Page, browsing, find_browser
from tests.kit.scripts.web import TOKEN, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not find_browser() and not os.environ.get("CI"), reason=f"there is no {BINARY} here (Debian's package)"
    ),
]

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A tab of a screen's size. Nothing may go wrong in it, and its policy may have to refuse nothing."""
    tab = browser.page()
    yield tab
    assert tab.problems == []


def test_one_request_survives_a_kill_before_ones_eyes(lab: Lab, page: Page, tmp_path: Path):
    """Overview, search by keyboard, its timeline: a real worker is killed, another goes on, all without a reload."""
    victim = lab.worker()
    lab.reaper()
    request = lab.submit("count", {"n": 60, "sleep": 0.05})
    lab.moved(request, 5)
    with serving(lab.url, tmp_path, "--every", "0.2") as site:
        page.open(site.url)
        page.says("gpu", "section.panel:nth-of-type(1)")
        page.says(victim.name, "section.panel:nth-of-type(2)")
        page.says(request, "section.panel:nth-of-type(3)")
        page.press("/", 191, "/")
        page.wait("document.activeElement.name === 'id'")
        page.type(request)
        page.press("Enter", 13, "\r")
        page.says("started", ".headline")
        page.wait("document.querySelectorAll('.chart .bar.running').length > 0")
        page.run("window.before = 'the same page'")
        victim.kill()
        second = lab.worker()
        page.wait("document.querySelectorAll('.chart .cross').length > 0")
        page.says("finished", ".headline")
        shown = page.says("finished", ".chart + .scroll")
        assert [victim.name in shown, second.name in shown, "WORKER_LOST" in shown] == [True, True, True]
        assert page.run("document.querySelectorAll('.chart svg .bar.lost').length") == 2  # the bar, and the legend's
        assert page.run("document.querySelectorAll('.chart .tick').length") >= 2
        assert page.run("window.before") == "the same page"
        lab.check(request, 60)
        page.run("location.hash = '#/request/nobody'")
        page.says("nobody", ".problem")


def test_foreign_text_stays_text(page: Page, connection: redis.Redis, redis_url: str, tmp_path: Path):
    """Markup in an error, a worker's and a queue's name is shown as it is. A wrong token changes nothing, the right one
    all.
    """
    pool = Pool.over(connection)
    hand = Hand(pool, EVIL)
    hand.beat()
    names = [f"r{number}" for number in range(60)]
    pool.submit(*names, retries=0)
    for name in names:
        assert hand.fail(hand.take(name), FailureKind.UNKNOWN, f"page {name[1:]}: {EVIL}") == "failed"
    connection.sadd(key("queues"), key("queue", EVIL))
    with serving(redis_url, tmp_path) as site:
        page.open(site.url)
        page.says(EVIL, "section.panel:nth-of-type(1)")
        page.says(EVIL, "section.panel:nth-of-type(2)")
        page.open(f"{site.url}/#/request/r7")
        page.says(EVIL, ".note.bad")
        page.click("nav a", "Dead letters")
        page.says(EVIL, ".reason")
        page.click("button", "Show each")
        page.says("More (40)", ".group")
        page.click("button", "Requeue all 60")
        page.says("60 failures go back", "dialog")
        page.click("dialog input")
        page.type("not-the-token-at-all")
        page.press("Enter", 13, "\r")
        page.says("the token is wrong", "dialog")
        assert pool.waiting() == []
        page.click("dialog input")
        page.type(TOKEN)
        page.click("#dialog-go")
        page.says("60 requeued.", ".toast")
        page.says("Nothing has failed.", "main")
        assert sorted(pool.waiting()) == sorted(names)
        assert page.run("document.querySelectorAll('main script, main img').length") == 0
        assert TOKEN not in page.run("location.href + document.cookie + JSON.stringify(localStorage)")


def test_a_request_shows_what_it_holds_and_is_canceled(
    page: Page, connection: redis.Redis, redis_url: str, tmp_path: Path
):
    """With the token, which is asked for once. What is shown stays text."""
    pool = Pool.over(connection)
    pool.submit("a")
    with serving(redis_url, tmp_path) as site:
        page.open(f"{site.url}/#/request/a")
        page.click("button", "Payload and outputs")
        page.says("The token of this page", "dialog")
        page.click("dialog input")
        page.type(TOKEN)
        page.click("#dialog-go")
        page.says('"n": "a"', "main")
        page.click("button", "Cancel the request")
        page.says("it may finish before", "dialog")
        page.click("#dialog-go")
        page.says("canceled", ".headline")
        assert pool.status("a") == "canceled"
        page.wait("![...document.querySelectorAll('button')].some((b) => b.textContent.startsWith('Cancel the'))")


def test_requests_are_found_by_what_they_say(page: Page, connection: redis.Redis, redis_url: str, tmp_path: Path):
    """The filters stand in the address; "back" takes them off."""
    pool = Pool.over(connection)
    pool.submit("alpha", "beta")
    with serving(redis_url, tmp_path) as site:
        page.open(f"{site.url}/#/requests")
        page.says("alpha", "main tbody")
        page.click("input[name=text]")
        page.type("BET")
        page.press("Enter", 13, "\r")
        page.wait(
            "location.hash.includes('text=BET') && !document.querySelector('main tbody').textContent.includes('alpha')"
        )
        page.says("beta", "main tbody")
        page.run("history.back()")
        page.says("alpha", "main tbody")


def test_a_requeue_that_cannot_help_says_so(page: Page, connection: redis.Redis, redis_url: str, tmp_path: Path):
    pool = Pool.over(connection)
    hand = Hand(pool, "w")
    hand.beat()
    pool.submit("bad", "late", retries=0)
    assert hand.fail(hand.take("bad"), FailureKind.INVALID_REQUEST, "max_tokens") == "failed"
    assert hand.fail(hand.take("late"), FailureKind.ERROR, "a moment") == "failed"
    with serving(redis_url, tmp_path) as site:
        for name, go in (("bad", "Requeue all the same"), ("late", "Requeue")):
            page.open(f"{site.url}/#/request/{name}")
            page.click("button", "Requeue…")
            page.says(go, "#dialog-go")
            assert page.run("document.getElementById('dialog-text').textContent.includes('cannot pass')") is (
                name == "bad"
            )
            page.click("#dialog-cancel")


def test_an_outage_is_told_and_ends_without_a_reload(page: Page, server_binary: Path, tmp_path: Path):
    """Redis away, then the server of the page: a banner each time, and all goes on by itself."""
    with Server(binary=server_binary, die_with_parent=True) as server:
        with connect(server.url) as connection:
            Pool.over(connection).submit("a")
        with serving(server.url, tmp_path, "--every", "0.2") as site:
            page.open(site.url)
            page.says("live", "#live")
            page.run("window.before = 'the same page'")
            server.kill()
            page.says("Redis is away since", "#banner")
            assert "gpu" in page.text("main")
            server.restart()
            page.wait(
                "document.getElementById('banner').hidden && document.getElementById('live').innerText.includes('live')"
            )
            port = str(site.port)
            site.process.kill()
            page.says("does not answer", "#banner")
        with serving(server.url, tmp_path, "--every", "0.2", "--port", port):
            page.wait(
                "document.getElementById('banner').hidden && document.getElementById('live').innerText.includes('live')"
            )
            assert page.run("window.before") == "the same page"


# Of every text that is shown: its contrast with what is behind it, and what it says.
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (item) => {
    for (let each = item; each; each = each.parentElement) {
      const color = parse(getComputedStyle(each).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((item) => item.checkVisibility() && !item.closest("svg, :disabled"))
    .filter((item) => [...item.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((item) => {
      const [a, b] = [light(parse(getComputedStyle(item).color)), light(ground(item))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), item.textContent.trim().slice(0, 40)];
    });
})()"""


def test_it_works_on_a_phone_in_the_dark_and_by_keyboard(
    browser: Browser, connection: redis.Redis, redis_url: str, tmp_path: Path
):
    """No page is wider than its screen, every text has contrast enough, and pages and filters stand in the address."""
    pool = Pool.over(connection)
    hand = Hand(pool)
    hand.beat()
    pool.submit("dead", retries=0)
    hand.fail(hand.take("dead"), FailureKind.GPU_OOM, "CUDA out of memory")
    pool.submit(*(f"r{number:03}" for number in range(70)))
    hand.step(hand.take("r000"), ["x"])
    now = int(1000 * pool.now())
    degraded = {"mode": "degraded", "until": now + 600_000, "live": 1, "expected": 4, "since": now - 60_000}
    connection.hset(key("mode"), mapping=degraded)  # type: ignore[arg-type]
    connection.hset(key("unfit"), "node-7 cuda:0", f"{now}\tcuda:0\tnode-7\tw1\tXid 79")
    pages = ["#/", "#/requests", "#/requests?status=failed", "#/request/r000", "#/request/dead", "#/dead-letters"]
    with serving(redis_url, tmp_path, token="") as site:
        for width, dark in ((360, True), (1280, False)):
            tab = browser.page(width, 800, dark=dark)
            for number, path in enumerate(pages):
                tab.open(f"{site.url}/?{number}{path}")
                tab.says("live", "#live")
                tab.wait("document.querySelectorAll('main table tbody tr, main .group').length > 0")
                assert tab.run("document.documentElement.scrollWidth") == width, path
                poor = [item for item in tab.run(CONTRAST) if item[0] < 4.5]
                assert poor == [], (path, dark)
            assert tab.run("document.querySelector('.group .primary').disabled"), "read-only"
            tab.open(f"{site.url}/?{width}")
            assert "1 of 4 workers, since" in tab.says("cuda:0 on node-7 is not used: Xid 79", ".notes")
            assert "degraded" in tab.text("#mode")
            assert tab.problems == []
        tab.open(f"{site.url}/#/requests?status=queued")
        tab.click("a", "Next page")
        tab.wait("location.hash.includes('cursor=') && document.querySelectorAll('main tbody tr').length === 19")
        tab.run("history.back()")
        tab.wait("!location.hash.includes('cursor=') && document.querySelectorAll('main tbody tr').length === 50")
        tab.run("document.querySelector('[name=kind]').focus()")
        tab.type("GPU_OOM")
        tab.run("document.querySelector('[name=status]').value = ''")
        tab.press("Enter", 13, "\r")
        tab.wait(
            "location.hash === '#/requests?kind=GPU_OOM' && document.querySelectorAll('main tbody tr').length === 1"
        )
        tab.press("Tab", 9)
        eventually(lambda: tab.run("document.activeElement !== document.body"))
        assert tab.problems == []
