"""The Lua scripts and what is said about them: headers, arguments, the table of states."""

from __future__ import annotations

import re
from typing import Any

import pytest
import redis

from perdure.protocol import scripts
from perdure.protocol.scripts import Header

# How the scripts read their arguments, apart from `local a, b = arg(), tonumber(arg())`.
_LOOP = re.compile(r"for \w+ = 1, tonumber\(arg\(\)\) do")
_BINDING = re.compile(r"local ([\w, ]+) = (.*)")


def bound(body: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The names to which a script's code binds its arguments: plain ones, then those of each repeated group."""
    code = re.sub(r"--[^\n]*", "", body)
    plain: list[str] = []
    groups: list[list[str]] = []
    reads = 0
    for line in code.splitlines():
        if _LOOP.search(line):
            groups.append([])
            reads += 1
        elif (match := _BINDING.search(line)) and "arg()" in match[2]:
            names = [name.strip() for name in match[1].split(",")]
            assert len(names) == match[2].count("arg()"), f"names and arguments differ in number: {line.strip()}"
            (groups[-1] if groups else plain).extend(names)
            reads += len(names)
    assert reads == len(re.findall(r"(?<![\w.])arg\(\)", code)), "an argument is read in a way that is not seen here"
    return tuple(plain), [tuple(names) for names in groups]


def assert_header_fits(body: str) -> None:
    """The header's arguments are the code's, in the same order."""
    header = Header.parse(body)
    plain, groups = bound(body)
    assert header.arguments == plain
    assert list(header.groups.values()) == groups


@pytest.mark.parametrize("name", scripts.names())
def test_a_header_declares_what_the_code_reads(name):
    """The header is the contract by which Python passes arguments: it must be what the code binds, in order."""
    assert_header_fits(scripts.load(name).body)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("local incarnation, worker, reason =", "local worker, incarnation, reason ="),
        ("local incarnation, worker, reason =", "local incarnation, worker, cause ="),
        ("local id, execution = arg(), arg()", "local id, execution, why = arg(), arg(), arg()"),
        ("local id, execution = arg(), arg()", "local execution, id = arg(), arg()"),
        ("-- ARGV reason ", "-- ARGV cause "),
        ("-- EACH request: execution ", "-- EACH request: holder "),
        ("local incarnation, worker, reason = arg(), arg(), arg()", "local incarnation, worker = arg(), arg()"),
        ("local answers = {}", "local answers = { arg() }"),
        ("local answers = {}", "local answers = {}\nlocal more, still = arg()"),
    ],
)
def test_a_drifted_script_is_noticed(old, new):
    """The check above can fail: every kind of drift between header and code is one."""
    body = scripts.load("cancel").body
    assert_header_fits(body)
    assert body.count(old) == 1
    with pytest.raises(AssertionError):
        assert_header_fits(body.replace(old, new))


@pytest.mark.parametrize("name", scripts.names())
def test_a_header_says_what_the_script_returns(name):
    """A reader of a script sees its answers without reading the code."""
    assert re.search(r"^-- Returns +\S", scripts.load(name).body, re.MULTILINE)


@pytest.mark.parametrize("name", scripts.names())
def test_a_script_uses_only_what_old_servers_and_fakeredis_have(name):
    """Redis 6.2 runs every script, and so does a pretended one."""
    source = re.sub(r"--[^\n]*", "", scripts.load(name).source)
    for forbidden in ("cmsgpack", "cjson", "os.date", "LMPOP", "'KEYS'", "'SCAN'", "'LREM'", "#!lua"):
        assert forbidden not in source
    assert "KEY[" not in source, "of KEY a script has the names that are spelled in it: KEY.job"


def test_a_missing_and_an_unknown_argument_are_refused():
    """Python cannot call a script with other arguments than its header names."""
    script = scripts.load("promote")
    assert script.arguments({"limit": 5}, {"queue": [{"queue": "a"}, {"queue": "b"}]}) == [5, 2, "a", "b"]
    wrong: list[tuple[Any, Any]] = [
        ({}, {"queue": []}),
        ({"limit": 5, "more": 1}, {"queue": []}),
        ({"limit": 5}, {}),
        ({"limit": 5}, {"queue": [{"name": "a"}]}),
        ({"limit": 5}, {"queue": [], "worker": []}),
    ]
    for values, groups in wrong:
        with pytest.raises(TypeError, match=r"promote\.lua"):
            script.arguments(values, groups)


def test_a_script_runs_after_script_flush(connection: redis.Redis):
    """A restart or failover loses the script cache; the next call brings the source along."""
    call: Any = ({"limit": 5}, {"queue": []})
    assert scripts.load("promote")(connection, *call) == [b"0", b"0"]
    connection.script_flush()
    assert scripts.load("promote")(connection, *call) == [b"0", b"0"]
