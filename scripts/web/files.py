"""The files of the page: few and small, read once from the package, told apart by what is in them."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class Files:
    """Name -> what is served; nothing else of the disk can be asked for."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, str, str]] = {}
        for item in files(__package__).joinpath("static").iterdir():
            kind = KINDS.get(item.name.rpartition(".")[2])
            if kind is not None and item.is_file():
                content = item.read_bytes()
                self._files[item.name] = content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"'

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def answer(self, name: str, request: Request) -> Response:
        """The file, or that the browser has it already. Asked for each time: another release serves others."""
        content, kind, tag = self._files[name]
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        if tag in [item.strip() for item in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)
