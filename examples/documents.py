"""Read a large text file piece by piece; a crash costs no more than the piece that was being read.

In one terminal, from this folder:

    $ perdure up examples

and in another one, from this folder too:

    $ python documents.py

That makes ``novel.txt`` of a few megabytes, unless it is there, and counts what is in it. Kill a worker while it runs
(``kill -9``), and the figures are the same. With a Redis of your own, one or more of these do instead of the pool:

    $ rq worker -w perdure.workers.Worker --url redis://localhost:6379 examples

The state is a cursor and what has been added up so far, never the text. The same form fits audio: bytes are frames,
and what a codec needs of the frame before goes into the state as ``in_word`` does.
"""

from __future__ import annotations

import codecs
import os
import sys
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from perdure.producer import Client
from perdure.workers import InvalidRequest, Request, Step, task

CHUNK = 64 * 1024


@task
def count(request: Request) -> Generator[Step, None, Any]:
    """Count the characters, words and lines of a UTF-8 file.

    Payload: ``path``; ``chunk``, bytes that are read at once; ``pause``, seconds to wait after each piece, so that
    there is something to watch. An output for each piece; the result is the sum of them, and a CRC of all bytes.
    """
    path, size, pause = checked(request.payload)
    with opened(path) as file:
        here = identity(file.fileno())
        at = request.state or {
            "file": here, "cursor": 0, "characters": 0, "words": 0, "lines": 0, "in_word": False, "crc": 0,
        }  # fmt: skip
        file.seek(at["cursor"])
        while at["cursor"] < at["file"][0]:
            data = file.read(size)
            # Asked after each read, and of the execution before: the sum of two different files is worth nothing.
            if identity(file.fileno()) != at["file"] or not data:
                raise InvalidRequest(f"{path} has changed since this request began to read it; submit it again", "path")
            text, used = whole_characters(data, at["cursor"], last=at["cursor"] + len(data) == at["file"][0])
            file.seek(at["cursor"] + used)  # the bytes of a cut character are read again, with the rest of it
            words = len(text.split())
            if at["in_word"] and not text[0].isspace():
                words -= 1  # the first of them began in the piece before
            # A new dict: what was put out before stays as it was.
            at = {
                "file": at["file"],
                "cursor": at["cursor"] + used,
                "characters": at["characters"] + len(text),
                "words": at["words"] + words,
                "lines": at["lines"] + text.count("\n"),
                "in_word": not text[-1].isspace(),
                "crc": zlib.crc32(data[:used], at["crc"]),
            }
            time.sleep(pause)
            yield Step(output={"until": at["cursor"], "words": words}, state=at)
    return {name: at[name] for name in ("characters", "words", "lines", "crc")}


def checked(payload: Any) -> tuple[str, int, float]:
    """Path, chunk and pause of a payload. What is wrong with one is told by name, and is never retried."""
    if not isinstance(payload, dict) or not isinstance(payload.get("path"), str):
        raise InvalidRequest("path is the name of a file that the worker can read", "path")
    size, pause = payload.get("chunk", CHUNK), payload.get("pause", 0)
    if type(size) is not int or size < 4:
        raise InvalidRequest("chunk is a number of bytes, 4 or more: a character may take so many", "chunk")
    if not isinstance(pause, int | float) or not 0 <= pause <= 1:
        raise InvalidRequest("pause is in seconds, from 0 to 1", "pause")
    return payload["path"], size, pause


def opened(path: str) -> Any:
    """The file, for reading bytes. One that is missing will be missing next time; other errors are retried."""
    try:
        return Path(path).open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", "path") from error


def identity(descriptor: int) -> list[int]:
    """What tells a file from what it was before: size in bytes, and time of the last change in nanoseconds.

    A list, since that is what a tuple comes back as. No inode: another worker may see the same file elsewhere.
    """
    status = os.fstat(descriptor)
    return [status.st_size, status.st_mtime_ns]


def whole_characters(data: bytes, start: int, *, last: bool) -> tuple[str, int]:
    """The text in ``data`` without a character that is cut off at its end, and how many bytes that text has."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data, final=last)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"byte {start + error.start} of the file is not UTF-8", "path") from error
    cut, _ = decoder.getstate()
    return text, len(data) - len(cut)


# --- the producer ----------------------------------------------------------------------------------------


def write_novel(path: Path) -> None:
    """A few megabytes with characters of one to four bytes."""
    line = "It was a dark and stormy night; 夜は暗く、嵐だった — и шёл дождь. 🌩\n"
    path.write_text(line * 50_000, encoding="utf-8")


def main() -> None:
    """Submit a file, and show how it is read."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "novel.txt").resolve()
    if not path.exists():
        write_novel(path)
    with Client() as client:
        # By its dotted path: in this process the task's module is __main__, which no worker could import.
        handle = client.submit("documents.count", {"path": str(path), "pause": 0.01}, queue="examples")
        print(f"request {handle.id}")
        for output in handle.stream():
            print(f"  {output['until']:,} bytes read", end="\r", flush=True)
        print()
        print(handle.result())


if __name__ == "__main__":
    main()
