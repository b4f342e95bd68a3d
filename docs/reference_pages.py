"""The pages under docs/reference, made from annotations and docstrings. Run by ``scripts/reference``.

The code is read by griffe and not imported, but for the settings and the options of a submit, whose help stands in
their metadata. What an annotation or a docstring names links to where that is described.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import griffe
from failure_page import failure_page
from script_page import script_page

from perdure.producer import Client
from perdure.protocol.settings import Settings, variable

FOLDER = Path(__file__).parent / "reference"

PAGES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "producer": (
        "Producers: submit, wait, stream",
        {
            "perdure.producer": (
                "Client", "Handle", "as_completed", "AsyncClient", "AsyncHandle", "as_completed_async",
            ),
            "perdure.producer.reading.listing": ("Listing",),
            "perdure.protocol.records": ("RequestRecord", "Event", "Checkpoint", "FailureKind"),
            "perdure.protocol.states": ("State",),
            "perdure.protocol.reading.mode": ("Mode",),
        },
    ),
    "workers": (
        "Workers and tasks",
        {
            "perdure.workers": ("task", "Step", "Request", "BatchTask", "Worker"),
            "perdure.workers.testing": ("resume_at_every_step", "Report"),
            "perdure.workers.tasks.collectives": ("Collectives", "CollectiveFailed"),
            "perdure.workers.tasks.unfit": ("Unfit",),
        },
    ),
    "errors": (
        "Errors",
        {
            "perdure.protocol.errors": (
                "PerdureError", "UsageError", "InvalidRequest", "UnknownTask", "PayloadTooLarge",
                "IdempotencyConflict", "SettingsError", "RequestFailed", "DeadlineExceeded", "RequestCanceled",
                "OutputsRestarted", "OutputsLost", "TryAgainLater", "QueueFull", "Degraded", "UnknownRequest", "RedisUnavailable",
                "DurabilityUnavailable", "SnapshotError", "ProtocolMismatch",
            ),
        },
    ),
    "settings": ("Settings", {"perdure.protocol.settings": ("Settings",)}),
    "recovery": (
        "Recovery",
        {
            "perdure.recovery": (
                "Reaper", "classify", "describe", "failure", "lost_peer", "Policy", "POLICIES", "Death", "device_kind",
                "Snapshots", "Snapshot",
            ),
        },
    ),
}  # fmt: skip
"""File -> title, and what it describes: module from which it is imported -> names, in the order of the page."""

HOOKS = {"Worker.handle_payload", "Worker.cleanup_execution", "Worker.run_maintenance_tasks"}
"""Public by name only: RQ calls them."""

NOTE = "<!-- Made by scripts/reference from the docstrings; changes belong there. -->\n"


@dataclass(frozen=True)
class Entry:
    """One heading of a page: what it describes, under which name and from where it is imported."""

    name: str
    page: str
    module: str
    item: Any
    owner: str = ""

    @property
    def anchor(self) -> str:
        return "#" + re.sub(r"[^\w-]", "", self.name.lower())


class Reference:
    """All pages, as text."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("perdure.protocol")
        assert spec is not None
        root = Path(next(iter(spec.submodule_search_locations or ()))).parent.parent
        self.loader = griffe.GriffeLoader(search_paths=[root])
        for package in ("producer", "workers", "protocol", "recovery"):
            self.loader.load(f"perdure.{package}")
        self.entries = [
            entry
            for page, (_, modules) in PAGES.items()
            for module, names in modules.items()
            for name in names
            for entry in self._entries(page, module, name)
        ]
        self.places = {entry.name: f"{entry.page}.md{entry.anchor}" for entry in self.entries}

    def pages(self) -> dict[str, str]:
        """File name -> its text."""
        made = {}
        for page, (title, modules) in PAGES.items():
            parts = [NOTE, f"# {title}\n"]
            if page == "errors":
                parts.append(self.text(self._module("perdure.protocol.errors").docstring.value, ""))
            parts += [self.entry(entry) for entry in self.entries if entry.page == page]
            if page == "settings":
                parts.append(settings_table())
            made[f"{page}.md"] = re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"
            assert modules
        made["failures.md"] = NOTE + "\n" + failure_page().rstrip() + "\n"
        made["scripts.md"] = NOTE + "\n" + script_page().rstrip() + "\n"
        return made

    def undocumented(self) -> list[str]:
        """Names on the pages that have no docstring."""
        return [entry.name for entry in self.entries if not self._docstring(entry)]

    # --- finding ---------------------------------------------------------------------------------

    def _module(self, name: str) -> Any:
        return self.loader.modules_collection[name]

    def _entries(self, page: str, module: str, name: str) -> Iterator[Entry]:
        item = self._module(module)[name]
        item = item.final_target if item.is_alias else item
        yield Entry(name, page, module, item)
        if item.is_class:
            fields = "dataclass" in item.labels or any("Enum" in str(base) for base in item.bases)
            # What is inherited stands here too if it says something: its class may stand on no page.
            inherited = {key: value for key, value in item.inherited_members.items() if value.has_docstring}
            for member_name, member in (item.members | inherited).items():
                if member_name.startswith("_") or (member.is_attribute and fields and "property" not in member.labels):
                    continue
                if member.is_attribute and member.annotation is None and not _wrapped(member):
                    continue  # what __init__ keeps
                if f"{name}.{member_name}" in HOOKS:
                    continue
                yield Entry(f"{name}.{member_name}", page, module, member, name)

    def _docstring(self, entry: Entry) -> str:
        if entry.owner == "Client" and _taken(entry.item):
            return str(getattr(Client, entry.item.name).__doc__)  # with what the options say
        if entry.item.docstring:
            return str(entry.item.docstring.value)
        original = _wrapped(entry.item)
        return f"As :meth:`{original}`, to be awaited." if original else ""

    # --- rendering -------------------------------------------------------------------------------

    def entry(self, entry: Entry) -> str:
        """Heading, signature and docstring."""
        level = "###" if entry.owner else "##"
        parts = [f"{level} {entry.name}\n"]
        if not entry.owner:
            parts.append(f"`from {entry.module} import {entry.name}`\n")
        if signature := self.signature(entry):
            parts.append(f"```python\n{signature}\n```\n")
        parts.append(self.described(entry))
        if entry.item.is_class:
            parts.append(self.fields(entry))
        return "\n".join(parts)

    def signature(self, entry: Entry) -> str:
        item = entry.item
        if item.is_class:
            bases = ", ".join(str(base) for base in item.bases)
            line = f"class {entry.name}({bases})" if bases else f"class {entry.name}"
            init = item.members.get("__init__")
            # Forty settings stand in a table below.
            return (
                line if init is None or item.name == "Settings" else line + "\n" + _call(entry.name, init, returns="")
            )
        if item.is_function:
            forms = item.overloads or [item]
            asked = self._module("perdure.producer.options")[taken] if (taken := _taken(item)) else None
            return "\n".join(_form(entry.name, form, asked) for form in forms)
        if original := _wrapped(item):
            function = self._module("perdure.producer")["Client"].final_target.members[original.rpartition(".")[2]]
            return "async " + _call(entry.name, function, returns=str(function.returns))
        annotation = "" if item.annotation is None else f": {item.annotation}"
        value = "" if item.value is None or len(str(item.value)) > 60 else f" = {item.value}"
        return f"{entry.name}{annotation}{value}"

    def described(self, entry: Entry) -> str:
        """The docstring with its sections."""
        value = self._docstring(entry)
        if not value:
            return ""
        owner = entry.owner or entry.name
        docstring = griffe.Docstring(value, parent=entry.item)
        parts = []
        for section in docstring.parse("google", warnings=False, returns_named_value=False):
            content: Any = section.value
            if section.kind is griffe.DocstringSectionKind.text:
                parts.append(self.text(content, owner))
            elif section.kind is griffe.DocstringSectionKind.parameters:
                rows = [f"- `{row.name}`: {self.line(row.description, owner)}" for row in content]
                parts.append("Arguments:\n\n" + "\n".join(rows) + "\n")
            elif section.kind is griffe.DocstringSectionKind.raises:
                rows = [
                    f"- {self.name(str(row.annotation), owner)}: {self.line(row.description, owner)}" for row in content
                ]
                parts.append("Raises:\n\n" + "\n".join(rows) + "\n")
            else:
                raise ValueError(f"{entry.name}: a docstring section of kind {section.kind} is not rendered")
        return "\n".join(parts)

    def fields(self, entry: Entry) -> str:
        """A table of a dataclass' fields, or of an enumeration's members."""
        item = entry.item
        enum = any("Enum" in str(base) for base in item.bases)
        if item.name == "Settings" or not (enum or "dataclass" in item.labels):
            return ""
        rows, told = [], False
        for name, member in item.members.items():
            if name.startswith("_") or not member.is_attribute or "property" in member.labels:
                continue
            says = self.line(member.docstring.value, entry.name) if member.docstring else ""
            told = told or bool(says)
            default = "" if member.value is None else f"`{_default(str(member.value))}`"
            if enum:
                rows.append(f"| `{name}` | {says} |")
            else:
                annotation = str(member.annotation).replace("|", "\\|")
                rows.append(f"| `{name}` | `{annotation}` | {default} | {says} |")
        if not told:
            return ""  # the signature has it all, and the class' docstring says what they are
        head = "| member | |\n|---|---|\n" if enum else "| field | type | default | |\n|---|---|---|---|\n"
        return head + "\n".join(rows) + "\n"

    def text(self, value: str, owner: str) -> str:
        """A docstring's text as Markdown: indented blocks become fenced ones, names become links."""
        parts = []
        for block in re.split(r"\n{2,}(?=\S)|\n{2,}(?= {4})", value.replace("\n::\n", "\n").strip()):
            if block.startswith("    "):
                code = textwrap.dedent(block).rstrip()
                parts.append(f"```{_language(code)}\n{code}\n```\n")
            elif block.strip() != "::":
                prose = re.sub(r"::$", ":", block)
                parts.append(self.linked(prose, owner) + "\n")
        return "\n".join(parts)

    def line(self, value: str, owner: str) -> str:
        return self.linked(" ".join(value.split()), owner)

    def linked(self, text: str, owner: str) -> str:
        text = re.sub(r"``([A-Z]\w+)``", lambda match: self.name(match[1], owner), text)
        text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
        return re.sub(r":\w+:`([^`]+)`", lambda match: self.name(match[1], owner), text)

    def name(self, name: str, owner: str) -> str:
        """A name as code, with a link if it stands on a page."""
        name = name.lstrip("~.")
        last = name.split(".")
        for known in (f"{owner}.{name}", name, ".".join(last[-2:]), last[-1]):
            if known in self.places:
                shown = name if not name.startswith("perdure.") else last[-1]
                return f"[`{shown}`]({self.places[known]})"
        return f"`{name}`"


def _wrapped(item: Any) -> str:
    """``Client.submit`` for a method of the asynchronous client that is made of that one."""
    match = re.fullmatch(r"_awaited\((Client\.\w+)\)", str(getattr(item, "value", "")))
    return match[1] if match else ""


def _taken(function: Any) -> str:
    """``Submit`` for a method whose arguments are the fields of that class."""
    decorators = (re.fullmatch(r"taking\((\w+)\)", str(item.value)) for item in getattr(function, "decorators", ()))
    return next((match[1] for match in decorators if match), "")


def _form(name: str, function: Any, asked: Any) -> str:
    """A signature; ``asked``: the class whose fields are the arguments, if it is not the function's own."""
    kind = "async " if "async" in function.labels else ""
    decorated = "@classmethod\n" if "classmethod" in function.labels else ""
    returns = re.sub(r"(\w*Handle)s", r"list[\1]", str(function.returns or ""))
    return decorated + kind + _call(name, asked or function, returns=returns)


def _call(name: str, function: Any, *, returns: str) -> str:
    """A signature on one line, or with a line for each parameter where that is longer than the page."""
    shown: list[str] = []
    star = slash = False
    parameters = [item for item in function.parameters if item.name not in ("self", "cls")]
    for item in parameters:
        kind = str(item.kind.value)
        if slash and kind != "positional-only":
            shown.append("/")
        slash = kind == "positional-only"
        if kind == "keyword-only" and not star:
            shown.append("*")
            star = True
        star = star or kind == "variadic positional"
        mark = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        annotation = f": {item.annotation}" if item.annotation else ""
        default = f" = {item.default}" if item.default is not None and not mark else ""
        shown.append(f"{mark}{item.name}{annotation}{default}")
    if slash:
        shown.append("/")
    end = f" -> {returns}" if returns else ""
    flat = f"{name}({', '.join(shown)}){end}"
    if len(flat) <= 100:
        return flat
    return f"{name}(\n" + "".join(f"    {item},\n" for item in shown) + f"){end}"


def _default(value: str) -> str:
    made = re.fullmatch(r"field\(default_factory=(.+)\)", value)
    return f"{made[1]}()" if made else value


def _language(code: str) -> str:
    try:
        ast.parse(code)
    except SyntaxError:
        # "async with" outside of a function is as good.
        try:
            ast.parse("async def main():\n" + textwrap.indent(code, "    "))
        except SyntaxError:
            return "text"
    return "python"


def settings_table() -> str:
    """Every setting: how it is spelled, what it is by default, what it rules."""
    rows = []
    for item in dataclasses.fields(Settings):
        default = ",".join(item.default) if isinstance(item.default, tuple) else item.default
        shown = f"`{default:g}`" if isinstance(default, float) else f"`{default}`" if default != "" else ""
        rows.append(f"| `{item.name}` | `{variable(item.name)}` | `{item.type}` | {shown} | {item.metadata['help']} |")
    return "| field | environment | type | default | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def main() -> int:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    made = Reference().pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
