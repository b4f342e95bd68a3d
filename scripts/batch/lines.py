"""The input: one request a line, in OpenAI's format, checked as a whole before anything starts.

The file is read twice: once to check it, once to run it, and of neither more than a line is kept. What is kept of a
line in between is a digest of its ``custom_id`` (some 200 bytes in all) and a checksum; of a bad one, what is wrong
with it.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, NoReturn, Self

from ...producer.options import Options
from ...producer.submission import build
from ...protocol.errors import InvalidRequest, UsageError
from ...protocol.keys import id_of_key
from ...protocol.records import NewRequest
from ...protocol.settings import Settings
from . import bodies

SHOWN: Final = 20
"""Bad lines that are told one by one; the others are counted."""

FIELDS: Final = ("custom_id", "method", "url", "body")
LONGEST_ID: Final = 512
LONGEST: Final = 64 * 1024 * 1024
"""Bytes of a line: a payload of 8 MiB, however it is escaped."""

LONGEST_REASON: Final = 1000
"""Characters of what is said of a bad line."""

_BOM = b"\xef\xbb\xbf"
_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of the file; ``number`` counts from 1, ``offset`` is where it begins."""

    number: int
    offset: int
    custom_id: str
    url: str
    task: str
    payload: Any
    model: str


@dataclass(frozen=True, slots=True)
class Bad:
    """A line that cannot be run, and why. ``custom_id`` is empty if it has none of its own."""

    custom_id: str
    reason: str


def parse(raw: bytes, number: int, offset: int = 0) -> BatchLine:
    """Read one line. Raises :class:`InvalidRequest`, saying what is wrong with it."""
    if len(raw) > LONGEST:
        raise InvalidRequest(f"more than {LONGEST:,} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not UTF-8: byte 0x{raw[error.start]:02x} after {error.start} bytes") from None
    try:
        value = json.loads(text, parse_constant=_no_json)
    except RecursionError:
        raise InvalidRequest("nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"must be an object with {', '.join(FIELDS)}, not {bodies.kind(value)}")
    for name in value:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            raise InvalidRequest(f"unknown field {name!r:.80}" + (f"; did you mean {near[0]}?" if near else ""))
    custom_id, url = value.get("custom_id"), value.get("url")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= LONGEST_ID:
        raise InvalidRequest(
            f"custom_id must be a text of 1 to {LONGEST_ID} characters, not {bodies.kind(custom_id)}", "custom_id"
        )
    if not _encodable(custom_id):
        raise InvalidRequest("custom_id holds half of a surrogate pair, which is not text", "custom_id")
    if value.get("method") != "POST":
        raise InvalidRequest(f"method must be POST, not {bodies.kind(value.get('method'))}", "method")
    if not isinstance(url, str):
        raise InvalidRequest(f"url must be a text, not {bodies.kind(url)}", "url")
    if "body" not in value:
        raise InvalidRequest("there is no body", "body")
    task, payload = bodies.asked(url, value["body"])
    model = value["body"].get("model") or "" if task == bodies.GENERATE and url != task else ""
    return BatchLine(number, offset, custom_id, url, task, payload, model)


def custom_id_of(raw: bytes) -> str:
    """The ``custom_id`` of a line that :func:`parse` refuses; empty if it has none that can be used."""
    try:
        value = json.loads(raw.decode()) if len(raw) <= LONGEST else None
    except (ValueError, RecursionError):
        return ""
    name = value.get("custom_id") if isinstance(value, dict) else None
    return name if isinstance(name, str) and 1 <= len(name) <= LONGEST_ID and _encodable(name) else ""


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no value in JSON")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Source:
    """The file of a batch, opened; for stdin, or what else can be read only once, a copy without a name.

    Raises :class:`UsageError` if it cannot be read.
    """

    def __init__(self, path: str, folder: Path) -> None:
        """``folder``: where a copy would have room."""
        self.name = "stdin" if path == "-" else path
        try:
            opened: IO[bytes] = sys.stdin.buffer if path == "-" else Path(path).open("rb")  # noqa: SIM115
            mode = os.fstat(opened.fileno()).st_mode
        except (OSError, io.UnsupportedOperation) as error:
            raise UsageError(f"cannot read {self.name}: {reason_of(error)}") from None
        if stat.S_ISDIR(mode):
            opened.close()
            raise UsageError(f"cannot read {self.name}: it is a folder")
        self._file = opened
        if not stat.S_ISREG(mode) or path == "-":
            try:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
                shutil.copyfileobj(opened, self._file, _PIECE)
                self._file.flush()
            except OSError as error:
                raise UsageError(f"cannot copy {self.name} to {folder}, to read it twice: {reason_of(error)}") from None
            finally:
                if path != "-":
                    opened.close()

    def stat(self) -> os.stat_result:
        return os.fstat(self._file.fileno())

    def raw(self) -> Iterator[tuple[int, bytes]]:
        """Every line as it stands, with where it begins; of one that is too long, more than :data:`LONGEST` bytes."""
        offset = 0
        self._file.seek(0)
        while raw := self._file.readline(LONGEST + 1):
            rest = raw
            end = offset + len(raw)
            while len(raw) > LONGEST and not rest.endswith(b"\n") and (rest := self._file.readline(_PIECE)):
                end += len(rest)
            yield offset, raw
            offset = end
            self._file.seek(offset)  # somebody may have read elsewhere meanwhile

    def at(self, offset: int) -> bytes:
        """The line that begins there."""
        self._file.seek(offset)
        return self._file.readline()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def stripped(raw: bytes, offset: int) -> bytes:
    """A line without its end, and without the mark that some editors put before the first one."""
    return (raw.removeprefix(_BOM) if offset == 0 else raw).strip(b" \t\r\n")


@dataclass(slots=True)
class Checked:
    """A file, and which of its lines can be run."""

    name: str
    identity: str
    """What makes it this batch and no other: SHA-256 of the file and of the name it was given."""
    count: int
    """Lines that are not blank."""
    sums: array[int]
    """CRC-32 of each line, blank ones too: the second reading must find the same."""
    places: dict[bytes, int] = field(default_factory=dict)
    """Digest of a ``custom_id`` → its line, which may be a bad one."""
    bad: dict[int, Bad] = field(default_factory=dict)

    def line_of(self, custom_id: str) -> int | None:
        return self.places.get(digest(custom_id))

    def request_id(self, custom_id: str) -> str:
        """The id of a line's request: the same in every run of this file."""
        return request_id(self.identity, custom_id)

    def bad_id(self, number: int) -> str:
        """What a bad line has in the place of its request's id. One without a name of its own has its number."""
        return (
            self.request_id(name)
            if (name := self.bad[number].custom_id)
            else id_of_key(f"batch {self.identity}#{number}")
        )

    def request_ids(self, source: Source) -> Iterator[str]:
        """The ids of all lines that can be run, in their order."""
        for number, (offset, raw) in enumerate(source.raw(), 1):
            if number not in self.bad and (content := stripped(raw, offset)):
                yield self.request_id(parse(content, number, offset).custom_id)


def pages(items: Iterator[str], size: int) -> Iterator[list[str]]:
    """So many at a time."""
    while page := list(islice(items, size)):
        yield page


def digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()


def request_id(identity: str, custom_id: str) -> str:
    """The id that the line's idempotency key makes."""
    return id_of_key(f"batch {identity} {custom_id}")


def check(
    source: Source,
    settings: Settings,
    options: dict[str, Any],
    *,
    name: str = "",
    models: frozenset[str] | None = None,
) -> Checked:
    """Read the whole file. ``models``: the names under which what is served may be asked for; ``None``: any.

    Raises :class:`UsageError` for a file without any request.
    """
    whole = hashlib.sha256()
    places: dict[bytes, int] = {}
    sums = array("I")
    bad: dict[int, Bad] = {}
    count = 0
    for number, (offset, raw) in enumerate(source.raw(), 1):
        whole.update(raw)
        sums.append(zlib.crc32(raw))
        content = stripped(raw, offset)
        if not content:
            continue
        count += 1
        try:
            line = parse(content, number, offset)
            first = places.setdefault(digest(line.custom_id), number)
            if first != number:
                raise InvalidRequest(f"custom_id {line.custom_id!r:.80} is already that of line {first}")
            made(line, "", settings, options)
            if models is not None and line.model and line.model not in models:
                raise InvalidRequest(
                    f"body.model: {line.model!r:.80} is not served; the workers have {', '.join(sorted(models))} "
                    "(--any-model: whatever is asked for, what is served answers)",
                    "model",
                )
        except UsageError as error:
            if isinstance(error, InvalidRequest) and error.field in options:
                raise  # that is no line's
            mine = custom_id_of(content)
            if mine and places.setdefault(digest(mine), number) != number:
                mine = ""
            bad[number] = Bad(mine, f"line {number}: {error}"[:LONGEST_REASON])
    if not count:
        raise UsageError(f"{source.name} has no request: {'it is empty' if not sums else 'its lines are blank'}")
    identity = hashlib.sha256(f"{whole.hexdigest()} {name}".encode(errors="surrogatepass")).hexdigest()
    return Checked(source.name, identity, count, sums, places, bad)


def refuse_bad(checked: Checked) -> None:
    """Raise :class:`UsageError` if there are bad lines: it names the first :data:`SHOWN` and counts the others."""
    if not checked.bad:
        return
    number = len(checked.bad)
    refusal = UsageError(f"{number} bad {'line' if number == 1 else 'lines'} in {checked.name}; nothing was started")
    for bad in islice(checked.bad.values(), SHOWN):
        refusal.add_note(bad.reason)
    if number > SHOWN:
        refusal.add_note(f"… and {number - SHOWN} more")
    raise refusal


def made(line: BatchLine, identity: str, settings: Settings, options: dict[str, Any]) -> NewRequest:
    """The request of a line, as it is stored. Raises :class:`UsageError` for what it cannot have."""
    identifier = request_id(identity, line.custom_id)
    payload = line.payload
    if line.task == bodies.GENERATE and isinstance(payload, dict) and payload.get("seed") is None:
        # Not drawn: a request that has to be made again gives the same answer.
        payload = {**payload, "seed": int(identifier[1:17], 16) >> 1}
    try:
        meta = {"batch": identity[:12], "custom_id": line.custom_id}
        request = build(line.task, payload, settings, Options(id=identifier, meta=meta, **options))
    except InvalidRequest as error:
        if error.field in options:
            raise
        raise InvalidRequest(f"body: {error}", error.field) from None
    # The id says already which body it is. A digest of the payload would make another release's line a conflict.
    return replace(request, digest=hashlib.sha256(f"batch {identifier}".encode()).hexdigest())


def reason_of(error: Exception) -> str:
    """The reason alone: the path is said once."""
    return (getattr(error, "strerror", None) or str(error)).lower()
