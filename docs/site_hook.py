"""A step of ``mkdocs build``, named in ``mkdocs.yml``."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Of a fence such as ````` ```python tasks `````, the language alone: the other word is for the tests."""
    return re.sub(r"^```(\w+) [\w=]+$", r"```\1", markdown, flags=re.M)
