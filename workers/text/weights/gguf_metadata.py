"""What a GGUF file says about itself, each value of the kind that it must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ....protocol.errors import SettingsError

_NEEDED: Final = object()


class Metadata:
    """The fields of one file. Each method raises :class:`SettingsError` for a value of another kind, with both.

    Without a ``default`` a field that is not there is one, too.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def whole(self, name: str, default: Any = _NEEDED) -> int:
        """A whole number."""
        value = self._get(name, default)
        if value is not default and not _is_whole(value):
            raise self._wrong(name, "a whole number", value)
        return value  # type: ignore[no-any-return]

    def number(self, name: str, default: Any = _NEEDED) -> float:
        """A finite number."""
        value = self._get(name, default)
        if value is not default and not (isinstance(value, float) or _is_whole(value)):
            raise self._wrong(name, "a number", value)
        if not math.isfinite(value):
            raise self._wrong(name, "a finite number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: Any = _NEEDED) -> str:
        """A text."""
        value = self._get(name, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value  # type: ignore[no-any-return]

    def texts(self, name: str, default: Any = _NEEDED) -> list[str]:
        """A list of texts."""
        return self._list(name, default, "texts", lambda item: isinstance(item, str))

    def wholes(self, name: str, default: Any = _NEEDED) -> list[int]:
        """A list of whole numbers."""
        return self._list(name, default, "whole numbers", _is_whole)

    def numbers(self, name: str) -> list[float]:
        """A list of numbers, none of them NaN."""
        return self._list(name, _NEEDED, "numbers", _is_number)

    def _list(self, name: str, default: Any, kind: str, fits: Any) -> list[Any]:
        value = self._get(name, default)
        if not isinstance(value, list) or not all(fits(item) for item in value):
            raise self._wrong(name, f"a list of {kind}", value)
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self._fields.get(name, default)
        if value is _NEEDED:
            raise SettingsError(f"{self.path} does not say its {name}")
        return value

    def _wrong(self, name: str, kind: str, value: Any) -> SettingsError:
        told = f"a list of {len(value)}" if isinstance(value, list) else f"{value!r:.60}"
        return SettingsError(f"{self.path}: {name} should be {kind}, but is {told}; convert the model again")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and not math.isnan(value))
