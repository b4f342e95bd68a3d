"""The page docs/reference/scripts.md, made from the headers of the Lua scripts."""

from __future__ import annotations

import re

from perdure.protocol import scripts

_LINE = re.compile(r"(ARGV|EACH) +(?:(\w+): +)?(\w+) +(.*)")


def script_page() -> str:
    """Every script: what it does, its arguments in order, what it returns."""
    parts = [
        "# Scripts\n",
        "Every transition of the protocol, from the headers of `protocol/lua/*.lua`; "
        "[`protocol.md`](../protocol.md) says who calls them. `KEYS[1]` of each is `rq:perdure:schema` and only routes "
        "the call. An argument of a *row* is one of each row of that name; in front of the rows stands their number.\n",
    ]
    for name in scripts.names():
        parts.append(f"## {name}\n")
        parts.append(_described(scripts.load(name).body))
    return "\n".join(parts)


def _described(body: str) -> str:
    """One header as Markdown: paragraphs stay, arguments become a table."""
    comment = re.match(r"(?:--[^\n]*\n)+", body)
    assert comment
    lines = [line[2:].removeprefix(" ") for line in comment[0].splitlines()]
    text: list[str] = []
    rows: list[list[str]] = []
    before = ""
    for line in lines:
        if match := _LINE.fullmatch(line):
            rows.append([f"`{match[3]}`", match[2] or "", match[4]])
        elif before.startswith(("ARGV", "EACH")) and line.startswith("     "):
            rows[-1][2] += " " + line.strip()
            continue
        else:
            text.append(line)
        before = line
    intent, _, rest = "\n".join(text).partition("\n\n")
    returns, _, more = rest.strip().partition("\n\n")
    table = ["| argument | row | |", "|---|---|---|", *(f"| {row[0]} | {row[1]} | {_plain(row[2])} |" for row in rows)]
    # Every header has a paragraph that begins with the word; a test wants it.
    told = " ".join(returns.removeprefix("Returns").split())
    parts = [
        _plain(intent),
        *(["\n".join(table)] if rows else []),
        f"Returns {_plain(told)}",
        *map(_plain, more.split("\n\n")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """A paragraph on one line; what Markdown would take for a tag is none."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if number % 2 else part.replace("<", "\\<") for number, part in enumerate(parts))
