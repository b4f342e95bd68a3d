"""Docstrings as mkdocstrings needs them: an extension of griffe, named in ``mkdocs.yml``.

mkdocstrings reads signatures, annotations and sections. What it does not know are reStructuredText's roles and literal
blocks in our texts, and the arguments that ``taking`` gives a method from a dataclass.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

from perdure.producer import Client


class Docstrings(griffe.Extension):
    """Goes through the package once it is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change all of it, in place."""
        self._change(pkg)

    def _change(self, item: Any) -> None:
        if item.docstring:
            item.docstring.value = as_markdown(item, item.docstring.value)
        for member in item.members.values():
            if member.is_alias:
                continue
            if asked := _taken(member):
                member.parameters = item.module[asked].parameters
                if item.name == "Client":
                    member.docstring.value = getattr(Client, member.name).__doc__  # with what the options say
            self._change(member)


def as_markdown(item: Any, text: str) -> str:
    """A docstring's text; what it names links to where that is described."""
    text = re.sub(r"^::\n\n|::$", lambda match: ":" * (match[0] == "::"), text, flags=re.M)
    return re.sub(r":\w+:`([^`]+)`|``([A-Z]\w+)``", lambda match: _link(item, match[1] or match[2]), text)


def _link(item: Any, name: str) -> str:
    shown = name.lstrip("~.")
    shown = shown.rpartition(".")[2] if name[0] in "~." else shown
    if path := _path(item, name.lstrip("~.")):
        return f'<autoref identifier="{path}" optional>`{shown}`</autoref>'
    return f"`{shown}`"


def _path(item: Any, name: str) -> str:
    """Where a name leads that is seen from an item; empty if nowhere."""
    if name.startswith("perdure."):
        return name
    first, _, rest = name.partition(".")
    owner = item if item.is_class else item.parent
    if owner is not None and owner.is_class and first in owner.inherited_members:
        found = owner.inherited_members[first].canonical_path
    else:
        try:
            found = item.resolve(first)
        except griffe.NameResolutionError:
            return ""
    return f"{found}.{rest}" if rest else found


def _taken(function: Any) -> str:
    """``Submit`` for a method whose arguments are the fields of that class."""
    decorators = (re.fullmatch(r"taking\((\w+)\)", str(item.value)) for item in getattr(function, "decorators", ()))
    return next((match[1] for match in decorators if match), "")
