"""Takes the pictures of the documentation: a real pool under load, a real kill -9, a real browser.

    python -m tests.docs.captures [FOLDER]

In the root of a checkout, in about two and a half minutes; without FOLDER it writes into docs/images. Tasks sleep
instead of computing, all else is what it is: worker processes, a reaper, Redis, ``perdure web``, ``top`` and
``show``. ``kill.svg`` is what the tutorial has its reader draw.
"""

from __future__ import annotations

import io
import os
import pty
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.text import Text

from perdure.protocol.settings import Settings
from perdure.scripts.cli.top import Looks, drawn
from perdure.scripts.pool.server import Server
from tests.kit.docs.tutorial import newcomer
from tests.kit.lab import Lab, Process, eventually, laboratory
from tests.kit.places import DOCS
from tests.kit.scripts.browser import Browser, browsing
from tests.kit.scripts.web import TOKEN, Site, serving

IMAGES: Final = DOCS / "images"

LARGEST: Final = 150_000
"""Bytes of a picture."""

FAILURES: Final = [
    *[("extract", {"reason": f"page {page} of 'invoice-{100 + page}.pdf' has no text layer"}) for page in range(14)],
    *[("extract", {"reason": f"image {4000 + n}x{3000 + n} has more than 8388608 pixels"}) for n in range(5)],
    *[("embed", {"norm": 0}) for _ in range(3)],
]


@contextmanager
def loaded(lab: Lab) -> Iterator[None]:
    """Requests come all the time, about as many as three workers end."""
    ended = threading.Event()
    chance = random.Random(7)

    def submit() -> None:
        while not ended.wait(chance.uniform(0.05, 0.48)):
            payload = {"segments": chance.randint(20, 60), "sleep": chance.uniform(0.04, 0.12)}
            lab.submit(
                "page_tasks.transcribe", payload, queue=chance.choice(["gpu", "gpu", "gpu", "gpu-high", "gpu-low"])
            )

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def kill(lab: Lab, request: str) -> None:
    """SIGKILL to the worker that has the request, and another in its place, as ``perdure up`` has it."""
    victim = next(process for process in lab.processes if process.name == lab.record(request).worker)
    before = lab.record(request).execution
    victim.kill()
    worker(lab)
    eventually(lambda: lab.record(request).execution not in ("", before))


def worker(lab: Lab) -> Process:
    return lab.worker(queues=("gpu-high", "gpu", "gpu-low", "ocr"))


def pages(browser: Browser, site: Site, request: str, folder: Path) -> None:
    """The page in light and dark, and on a phone."""
    for dark in (False, True):
        suffix = "-dark" if dark else ""
        tab = browser.page(1200, 860, dark=dark)
        tab.open(site.url)
        tab.says("live", "#live")
        tab.wait(
            "document.querySelectorAll('.tile .line').length === 5"
            " && document.querySelectorAll('main tbody tr').length > 6"
        )
        tab.picture(folder / f"page-overview{suffix}.png")
        tab.open(f"{site.url}/#/request/{request}")
        tab.wait("document.querySelectorAll('.chart .cross').length > 2")
        tab.picture(folder / f"page-request{suffix}.png", whole=True)
        assert tab.problems == []
    tab.open(f"{site.url}/#/requests")
    tab.size(390, 844, 1.5)
    tab.open(f"{site.url}/#/request/{request}")
    tab.wait("document.querySelectorAll('.chart .cross').length > 2")
    tab.picture(folder / "page-phone.png")
    tab = browser.page(1200, 640)
    tab.open(f"{site.url}/#/dead-letters")
    tab.says("text layer")
    tab.click("article:nth-of-type(2) button", "Show each")
    tab.wait("document.querySelectorAll('main tbody tr').length === 5")
    tab.picture(folder / "page-dead-letters.png")
    assert tab.problems == []


# rich's own template fetches a font from elsewhere.
TEMPLATE: Final = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: ui-sans-serif, system-ui, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
  <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def terminal(file: Path, title: str, content: Any, width: int) -> None:
    """What a terminal shows, as a drawing."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(content)
    text = console.export_svg(title=title, code_format=TEMPLATE, unique_id=file.stem)
    file.write_text(re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE), encoding="utf-8")


def printed(*arguments: str) -> str:
    """What a command prints on a terminal, colours included."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(arguments, stdout=theirs, stderr=subprocess.STDOUT)
    os.close(theirs)
    parts = []
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # as a terminal ends
            break
        if not data:
            break
        parts.append(data)
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def terminals(lab: Lab, request: str, folder: Path) -> None:
    looks = Looks(Settings().replace(redis_url=lab.url), None, 8)
    looks.take()
    time.sleep(2)  # this is the measurement of the rates
    terminal(folder / "top.svg", "perdure top", Group(drawn(looks.take()), Text()), 112)
    command = [str(Path(sys.executable).with_name("perdure")), "show", request, "--url", lab.url]
    terminal(folder / "show.svg", "perdure show ID", Text.from_ansi(printed(*command)), 132)


def smaller(file: Path) -> None:
    """The same picture in a quarter less: areas of one colour pack best as they are, without a filter
    over their lines.
    """
    data = file.read_bytes()
    parts: list[tuple[bytes, bytes]] = []
    place = 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    head = parts[0][1]
    width, height, pixel = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:8], "big"), {2: 3, 6: 4}[head[9]]
    filtered = zlib.decompress(b"".join(content for kind, content in parts if kind == b"IDAT"))
    packed = zlib.compress(plain_lines(filtered, width * pixel, height, pixel), 9)
    kept = [(b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")]
    file.write_bytes(
        data[:8]
        + b"".join(
            len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
            for kind, content in kept
        )
    )


def plain_lines(filtered: bytes, width: int, height: int, pixel: int) -> bytes:
    """The lines of a PNG with their filters undone; ``width`` in bytes."""
    lines = bytearray()
    above = bytearray(width)
    for number in range(height):
        begin = number * (width + 1)
        how, line = filtered[begin], bytearray(filtered[begin + 1 : begin + 1 + width])
        for at in range(width) if how else ():
            left, up = line[at - pixel] if at >= pixel else 0, above[at]
            match how:
                case 1:
                    guess = left
                case 2:
                    guess = up
                case 3:
                    guess = (left + up) // 2
                case _:
                    corner = above[at - pixel] if at >= pixel else 0
                    guess = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
            line[at] = (line[at] + guess) & 255
        lines += b"\0" + line
        above = line
    return bytes(lines)


def main(folder: Path) -> None:
    """All pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, newcomer(Path(scratch)) as someone:
        someone.follow_all()
        shutil.copyfile(someone.folder / "long.svg", folder / "kill.svg")
    with tempfile.TemporaryDirectory() as scratch, Server(die_with_parent=True) as server:
        place = Path(scratch)
        (place / "browser").mkdir()
        with laboratory(server.url, place) as lab, serving(server.url, place) as site:
            lab.settings = {}
            lab.reaper()
            for _ in range(3):
                worker(lab)
            for name, payload in FAILURES:
                lab.submit(f"page_tasks.{name}", payload, queue="ocr", max_retries=0)
            with loaded(lab), site.watching() as events:
                request = lab.submit("page_tasks.transcribe", {"segments": 700, "sleep": 0.08}, queue="gpu-high")
                for outputs in (110, 290, 500):
                    eventually(lambda outputs=outputs: len(lab.outputs(request)) >= outputs and next(events), 90)  # type: ignore[misc]
                    if outputs < 500:
                        kill(lab, request)
                kill(lab, request)
                lab.moved(request, 560)
                with browsing(place / "browser") as browser:
                    pages(browser, site, request, folder)
                terminals(lab, request, folder)
        assert TOKEN not in "".join(path.read_text("latin-1") for path in folder.iterdir())
    for file in sorted(folder.glob("page-*.png")):
        smaller(file)
        print(f"{file.name}: {file.stat().st_size:,} bytes")
        assert file.stat().st_size <= LARGEST, file


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
