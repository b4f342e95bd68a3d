"""The files of a batch: what a crash has torn is cut off, what is anybody else's is left alone."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perdure.protocol.errors import PerdureError, UsageError
from perdure.protocol.settings import Settings
from perdure.scripts.batch.ledger import Ledger, entry
from perdure.scripts.batch.lines import Checked, Source, check

NAMES = ("a", "b", "ü", "d")


class Files:
    """An input of four lines, and where its two files stand."""

    def __init__(self, folder: Path) -> None:
        self.source, self.out, self.errors = folder / "in.jsonl", folder / "out.jsonl", folder / "errors.jsonl"
        self.write_source("x")

    def write_source(self, prompt: str) -> None:
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
            for name in NAMES
        ]
        self.source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def checked(self, name: str = "") -> Checked:
        with Source(str(self.source), self.source.parent) as source:
            return check(source, Settings(), {}, name=name)

    def line(self, name: str, text: str = "é\u2028") -> bytes:
        return entry(self.checked().request_id(name), name, {"body": text}, None)

    @contextmanager
    def open(self, out: Path | None = None, errors: Path | None = None) -> Iterator[Ledger]:
        with Ledger(out or self.out, errors or self.errors, self.source.stat()) as ledger:
            yield ledger

    def resume(self, name: str = "") -> tuple[list[str], int, int]:
        """Names of the lines that are done, and the counts."""
        with self.open() as ledger:
            done, kept, failed = ledger.resume(self.checked(name))
        return [name for number, name in enumerate(NAMES, 1) if done[number]], kept, failed


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_what_is_appended_is_done_in_the_next_run(files: Files) -> None:
    with files.open() as ledger:
        ledger.resume(files.checked())
        ledger.append([files.line("a"), files.line("ü")], [files.line("d")])
    assert files.resume() == (["a", "ü", "d"], 2, 1)
    assert len(files.out.read_text(encoding="utf-8").splitlines()) == 2, "no line has an end within"


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(files: Files) -> None:
    """At any byte; what was complete is kept, with its end if only that was lost."""
    whole = files.line("a") + files.line("b")
    first = len(files.line("a"))
    for length in (
        0,
        *range(first - 2, first + 22),
        *range(first + 22, len(whole) - 2, 7),
        *range(len(whole) - 2, len(whole) + 1),
    ):
        files.out.write_bytes(whole[:length])
        # Without its end a line is complete: it can be read.
        expected = [name for name, end in (("a", first - 1), ("b", len(whole) - 1)) if length >= end]
        assert files.resume() == (expected, len(expected), 0), length
        assert files.out.read_bytes() == b"".join(files.line(name) for name in expected), length


def test_zeros_that_a_file_system_left_are_cut_off(files: Files) -> None:
    files.out.write_bytes(files.line("a") + bytes(5000))
    assert files.resume() == (["a"], 1, 0)
    assert files.out.read_bytes() == files.line("a")


@pytest.mark.parametrize("content", [b"my diary", b"my diary\n", b'{"custom_id": "a"}', b"{}\n", b"\xff\xfe"])
def test_what_no_batch_has_written_is_left_alone(files: Files, content: bytes) -> None:
    """Refused and not cut, also as a last line."""
    for before in (b"", files.line("a")):
        files.out.write_bytes(before + content)
        with pytest.raises(UsageError, match=r"line [12] of .*out\.jsonl was not written by a batch run"):
            files.resume()
        assert files.out.read_bytes() == before + content


def test_a_bad_line_in_the_middle_is_refused(files: Files) -> None:
    files.out.write_bytes(files.line("a")[:20] + b"\n" + files.line("b"))
    with pytest.raises(UsageError, match="line 1"):
        files.resume()


def test_the_output_of_another_input_is_refused(files: Files) -> None:
    files.out.write_bytes(entry("i" + "0" * 39, "stranger", {}, None))
    with pytest.raises(UsageError, match=r"which .*in\.jsonl does not have: it is the output of another input"):
        files.resume()


def test_an_input_that_has_changed_is_refused(files: Files) -> None:
    """By one letter in another line, or by its name."""
    files.errors.write_bytes(files.line("a"))
    with pytest.raises(UsageError, match="has changed since"):
        files.resume(name="second")
    files.write_source("y")
    with pytest.raises(UsageError, match="has changed since"):
        files.resume()


def test_a_line_that_is_answered_twice_is_refused(files: Files) -> None:
    files.out.write_bytes(files.line("a"))
    files.errors.write_bytes(files.line("b") + files.line("a"))
    with pytest.raises(UsageError, match=r"line 2 of .*errors\.jsonl answers 'a' once more"):
        files.resume()


def test_two_runs_do_not_write_one_file(files: Files) -> None:
    """Neither of the two files, whoever comes second; and it is free again when the first has gone."""
    with files.open():
        other = files.out.with_name("other.jsonl")
        for out, errors in ((None, other), (other, None)):
            with pytest.raises(UsageError, match="is being written by another batch run"), files.open(out, errors):
                pass
    with files.open():
        pass


def test_a_file_has_one_part(files: Files) -> None:
    """Input, answers and errors are three files, whatever names they are given."""
    link = files.out.with_name("link")
    link.symlink_to(files.source)
    for out in (files.source, link):
        with pytest.raises(UsageError, match="is the input"), files.open(out):
            pass
    with pytest.raises(UsageError, match="cannot both go to"), files.open(files.out, files.out):
        pass


def test_what_cannot_be_written_is_told(files: Files, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "out.jsonl", Path("/dev/null")):
        with pytest.raises(UsageError, match="cannot write to"), files.open(path):
            pass


def test_a_full_disk_leaves_only_whole_lines(files: Files) -> None:
    """The write that did not fit is undone, and said; the same run could go on."""
    line = files.line("a", "x" * 3000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with files.open() as ledger:
        ledger.resume(files.checked())
        ledger.append([line], [])
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) + 1000, hard))
        try:
            with pytest.raises(PerdureError, match=r"cannot write to .*out\.jsonl.*same command again"):
                ledger.append([files.line("b", "y" * 3000)], [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.out.read_bytes() == line
