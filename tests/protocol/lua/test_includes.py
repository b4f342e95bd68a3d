"""What the Lua files include: each what it uses, no more and no less, and how they are put together."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from perdure.protocol import scripts
from perdure.protocol.keys import key
from perdure.protocol.scripts import IncludeError, linked
from tests.kit.protocol import lua_bytecode

FOLDER = files("perdure.protocol") / "lua"
SHARED = scripts.included()
GIVEN = {"redis", "ARGV", "KEYS", "KEY", "LATE", *lua_bytecode.STANDARD}
"""What a file has without including it: from Redis, from Python, from Lua."""


@cache
def text(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text(encoding="utf-8")


def included(source: str) -> list[str]:
    return re.findall(r"^--- @include (\S+)$", source, re.MULTILINE)


@cache
def providers() -> dict[str, str]:
    """Each name that a shared file defines -> the file."""
    found: dict[str, str] = {}
    for shared in SHARED:
        for name in lua_bytecode.names(text(shared)).defined:
            assert name not in found, f"{found[name]} and {shared} both define {name}"
            found[name] = shared
    return found


def assert_includes_fit(source: str) -> None:
    """A file includes the files that define what it uses itself, each once, and in the order of their names."""
    used = lua_bytecode.names(source).free - GIVEN
    assert used <= providers().keys(), f"nothing defines {used - providers().keys()}"
    assert included(source) == sorted({providers()[name] for name in used})


@pytest.mark.parametrize("name", [*scripts.names(), *SHARED])
def test_a_file_includes_what_it_uses_and_nothing_else(name):
    assert_includes_fit(text(name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--- @include lib/lease/detach\n", ""),
        ("--- @include lib/lease/detach\n", "--- @include lib/lease/detach\n--- @include lib/checkpoint/restart\n"),
        ("--- @include lib/lease/detach\n", "--- @include lib/lease/detach\n--- @include lib/lease/detach\n"),
        ("local answers = {}", "local answers = {}\nlocal function never() restart(answers) end"),
        ("local answers = {}", "local answers = {}\nlocal function never() anwsers = {} end"),
        ("then detach(queue, id, execution, incarnation, worker) end", "then --[[detach]] (queue or id)() end"),
    ],
)
def test_an_include_too_many_or_too_few_is_noticed(old, new):
    """The check above can fail: also for what no test ever runs."""
    assert_includes_fit(text("cancel"))
    assert text("cancel").count(old) == 1
    with pytest.raises(AssertionError):
        assert_includes_fit(text("cancel").replace(old, new))


@pytest.mark.parametrize("name", scripts.names())
def test_a_script_defines_every_name_that_it_uses(name):
    """As the server gets it: no order of includes leaves a function without one that stands behind it."""
    assert lua_bytecode.names(scripts.load(name).source).free <= GIVEN - {"KEY", "LATE"}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_file_has_one_idea(name):
    """It is short, and somebody includes it."""
    assert len(text(name).splitlines()) < 120
    assert any(name in included(text(other)) for other in (*scripts.names(), *SHARED))


@pytest.mark.parametrize("name", scripts.names())
def test_whatever_ends_or_renews_passes_at_maxmemory(name):
    """It begins with the write that needs no memory; what stores something new does not."""
    code = re.sub(r"^--.*\n|^\n", "", text(name), flags=re.MULTILINE)
    assert code.startswith("never_refused()\n") is (name not in scripts.GIVE_WAY)


def lay(folder: Path, **sources: str) -> Path:
    """Write Lua files into a folder; ``lib_a`` stands for ``lib/a.lua``."""
    (folder / "lib" / "basics").mkdir(parents=True)
    for name, source in sources.items():
        (folder / f"{name.replace('_', '/')}.lua").write_text(source)
    return folder


def test_each_file_stands_once_in_front_of_whoever_includes_it(tmp_path):
    """Without comments and blank lines, and behind the names of those keys that are used; what all use stands
    outside.
    """
    folder = lay(
        tmp_path,
        end="-- End.\n--\n-- Returns  2\n\n--- @include lib/a\n--- @include lib/b\n\nreturn a() + b() -- both\n",
        lib_a="-- One.\n--- @include lib/c\n\nlocal function a()\n  -- Why.\n  return c .. KEY.held\nend\n",
        lib_b="--- @include lib/c\n\nlocal function b()\n  return c\nend\n",
        lib_c="--- @include lib/basics/time\n\nlocal c = now_s\n",
        lib_d="local d = KEY.job\n",
        lib_basics_time="local now_s = 1\n",
    )
    assert linked("end", folder) == (
        f"local KEY = {{ held = '{key('held')}' }}\n"
        "local now_s = 1\n"
        "return (function()\n"
        "local c = now_s\n"
        "local function a()\n  return c .. KEY.held\nend\n"
        "local function b()\n  return c\nend\n"
        "return a() + b() -- both\n"
        "end)()\n"
    )


def test_a_file_that_is_missing_is_named(tmp_path):
    """With the one that includes it."""
    folder = lay(tmp_path, end="--- @include lib/a\n", lib_a="--- @include lib/leese\n")
    with pytest.raises(IncludeError, match=r"there is no Lua file .*/lib/leese\.lua, which lib/a\.lua includes"):
        linked("end", folder)
    with pytest.raises(IncludeError, match=r"there is no Lua file .*/begin\.lua$"):
        linked("begin", folder)


def test_files_that_include_each_other_are_named(tmp_path):
    """The way round, without the files that only lead to it."""
    folder = lay(
        tmp_path,
        end="--- @include lib/a\n",
        lib_a="--- @include lib/b\n",
        lib_b="--- @include lib/c\n",
        lib_c="--- @include lib/b\n",
    )
    with pytest.raises(IncludeError, match=r"in a circle: lib/b -> lib/c -> lib/b\. Move"):
        linked("end", folder)


def test_an_include_is_a_line_of_its_own(tmp_path):
    """One that is spelled in another way would be a comment, and its functions missing when they are called."""
    folder = lay(tmp_path, end="  --- @include lib/a\nreturn 1\n", lib_a="")
    with pytest.raises(IncludeError, match=r"end\.lua has a line that is not an include"):
        linked("end", folder)
