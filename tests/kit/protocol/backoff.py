"""The delays of retries, computed by the scripts' own function: the formula stands nowhere else."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable

import fakeredis


def schedule(request_id: str, retries: int, base: float, cap: float) -> list[float]:
    """Seconds before each of so many retries of a request, the first one first."""
    source = """
local function int(number) return string.format('%.0f', number) end
{function}
local delays = {{}}
for n = 1, tonumber(ARGV[2]) do
  delays[n] = string.format('%.9f', backoff(ARGV[1], n, tonumber(ARGV[3]), tonumber(ARGV[4])))
end
return delays
""".format(function=_function("backoff"))
    with fakeredis.FakeRedis() as connection:
        delays: list[bytes] = connection.eval(source, 0, request_id, retries, base, cap)
    return [float(delay) for delay in delays]


def backoff(request_id: str, n: int, base: float, cap: float) -> float:
    """Seconds before retry number ``n`` of a request; 1 is the first."""
    return schedule(request_id, n, base, cap)[-1]


def _function(name: str) -> str:
    """The source of a function of the scripts. Raises unless there is exactly one of that name."""
    pattern = re.compile(rf"^local function {name}\(.*?^end$", re.MULTILINE | re.DOTALL)
    (found,) = [text for source in _sources(files("perdure.protocol") / "lua") for text in pattern.findall(source)]
    return str(found)


def _sources(folder: Traversable) -> list[str]:
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _sources(entry)
        elif entry.name.endswith(".lua"):
            found.append(entry.read_text(encoding="utf-8"))
    return found
