"""The pages of docs/reference that are made from the code and stand in the repository. Run by ``scripts/reference``.

They are tables of what no library knows how to show: settings, kinds of failure, headers of Lua scripts. The Python API
and the commands are read by mkdocstrings and mkdocs-click when the site is built.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from failure_page import failure_page
from script_page import script_page

from perdure.protocol.settings import Settings, variable

FOLDER = Path(__file__).parent / "reference"

NOTE = "<!-- Made by scripts/reference from the code; changes belong there. -->\n\n"


def pages() -> dict[str, str]:
    """File name -> its text."""
    made = {"settings.md": settings_page(), "failures.md": failure_page(), "scripts.md": script_page()}
    return {name: NOTE + text.rstrip() + "\n" for name, text in made.items()}


def settings_page() -> str:
    """Every setting: how it is spelled, what it is by default, what it rules."""
    rows = []
    for item in dataclasses.fields(Settings):
        default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
        shown = f"`{default:g}`" if isinstance(default, float) else f"`{default}`" if default != "" else ""
        rows.append(f"| `{variable(item.name)}` | `{item.type}` | {shown} | {item.metadata['help']} |")
    return INTRODUCTION + "\n".join(rows) + "\n\n" + IN_PYTHON


INTRODUCTION = """\
# Settings

Each is a variable of the environment, a flag of the commands that use it, and a field of `Settings`:
`PERDURE_STEP_TIMEOUT`, `--step-timeout`, `step_timeout`. `perdure config show` says where each one comes from.

| variable | type | default | |
|---|---|---|---|
"""

IN_PYTHON = """\
## In Python

::: perdure.protocol.settings.Settings
    options:
      heading_level: 3
      show_signature: false

::: perdure.protocol.settings.variable
    options:
      heading_level: 3
"""


def main() -> int:
    """Write the pages."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
