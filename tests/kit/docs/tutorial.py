"""Somebody who has nothing but a wheel and an empty folder, and follows docs/tutorial.md."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kit.docs.pages import Block, blocks, commands, matches
from tests.kit.lab import LONG, eventually
from tests.kit.places import ROOT
from tests.kit.wheels import build

PAGE = blocks(ROOT / "docs" / "tutorial.md")


@dataclass
class Newcomer:
    """A folder, its virtual environment, and what the page had them start."""

    folder: Path
    wheel: Path
    environment: dict[str, str]
    pool: subprocess.Popen[bytes] | None = None
    printed: str = ""

    @property
    def log(self) -> str:
        return (self.folder / "pool.log").read_text(errors="replace")

    def install(self, block: Block) -> None:
        """The page's three commands; pip gets the wheel itself, and looks nothing up."""
        make, activate, install = [command for command, _ in commands(block)]
        assert make.startswith("python3 ")
        assert self.run(make.replace("python3", sys.executable)) == 0, self.printed
        assert activate == ". .venv/bin/activate"
        self.environment["PATH"] = f"{self.folder}/.venv/bin{os.pathsep}{self.environment['PATH']}"
        assert install.startswith("pip install perdure ")
        assert self.run(f"pip install --quiet --no-index --no-deps {self.wheel}") == 0, self.printed
        # What it depends on is that of the environment of the tests. A plain path in a .pth file is searched, but
        # the .pth files in it are not read: the checkout stays out of reach.
        (site,) = (self.folder / ".venv" / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        self.run("python -c 'import perdure.protocol; print(perdure.protocol.__file__)'")
        assert self.printed.startswith(str(site)), self.printed

    def start(self, block: Block) -> None:
        """The pool, in a terminal of its own."""
        ((command, _),) = commands(block)
        with (self.folder / "pool.log").open("wb") as log:
            self.pool = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.says("2 of 2 workers ready")

    def says(self, words: str) -> None:
        """Wait until the first terminal says so."""
        pool = self.pool
        assert pool is not None
        eventually(lambda: words in self.log or pool.poll() is not None)
        assert words in self.log, self.log

    def run(self, command: str) -> int:
        """A command in the second terminal; what it prints is in ``printed``."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=2 * LONG,
            check=False,
        )
        self.printed = done.stdout
        return done.returncode

    def follow(self, block: Block, status: int) -> None:
        """Each command of a block ends with the status and prints what the page shows."""
        for command, shown in commands(block):
            if "PID" in command:
                command = command.replace("PID", self.holder())
            ended = self.run(command)
            where = f"line {block.line}: {command}\n{self.printed}\n{self.log}"
            assert ended == status, where
            assert matches(squeezed(shown), squeezed(self.printed)), where

    def holder(self) -> str:
        """The number of the process that holds a request, from the table of workers."""

        def held() -> list[str]:
            assert self.run("perdure workers") == 0, self.printed
            head, *rows = self.printed.splitlines()
            assert (head.split()[2], head.split()[-1]) == ("PID", "HELD")
            return [row.split()[2] for row in rows if re.search(r"\s{2,}1( of \d+)?$", row)]

        (pid,) = eventually(held)
        return pid

    def mend(self, block: Block) -> None:
        """Put the page's line in place of the one that begins like it, and wait until nobody has the old one."""
        tasks = self.folder / "tasks.py"
        text, before = tasks.read_text(encoding="utf-8"), self.log
        assert len(block.text.splitlines()) == 1
        (old,) = [line for line in text.splitlines() if line.startswith(block.text[: block.text.index(" if ")])]
        tasks.write_text(text.replace(old, block.text.rstrip("\n")), encoding="utf-8")
        stale = set()
        for line in before.splitlines():
            if begun := re.search(r"perdure\.pool (worker-\d+)-\w+ started", line):
                stale.discard(begun[1])
            elif loaded := re.search(r"^(worker-\d+) \|.* loaded tasks\.", line):
                stale.add(loaded[1])
        assert stale, before
        eventually(lambda: all(re.search(rf"{place} \(.* is ready after", self.log[len(before) :]) for place in stale))
        assert "tasks.py was edited after" in self.log[len(before) :]

    def follow_all(self) -> None:
        """Each block of the page, in its order, and the Ctrl-C at its end."""
        for block in PAGE:
            match (block.language, block.kind):
                case ("console", "install"):
                    self.install(block)
                case ("python", "tasks" | "ask"):
                    (self.folder / f"{block.kind}.py").write_text(block.text, encoding="utf-8")
                case ("console", "up"):
                    self.start(block)
                case ("console", "run"):
                    self.follow(block, 0)
                case ("console", "fails"):
                    self.follow(block, 1)
                case ("python", "mend"):
                    self.mend(block)
                case _:
                    raise AssertionError(f"line {block.line}: a block that nobody follows")
        self.run("perdure show broken")
        assert "requeued at 2" in self.printed
        self.run("perdure result long --stream")
        assert self.printed.split() == [str(number) for number in range(60)]
        assert self.pool is not None
        self.pool.send_signal(signal.SIGINT)
        assert self.pool.wait(LONG) == 0, self.log


def squeezed(text: str) -> str:
    """Without what only aligns columns: names and numbers differ in length from run to run."""
    return re.sub(r" +", " ", text)


@contextmanager
def newcomer(place: Path) -> Iterator[Newcomer]:
    """Somebody in an empty folder below ``place``; whatever they have started is gone afterwards."""
    (wheel,) = build(place / "source").glob("*.whl")
    (place / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    someone = Newcomer(place / "empty", wheel, environment | {"XDG_STATE_HOME": str(place / "state")})
    try:
        yield someone
    finally:
        if someone.pool is not None and someone.pool.poll() is None:
            someone.pool.kill()  # its undertaker ends what it leaves behind
            someone.pool.wait()
