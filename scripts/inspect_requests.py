"""``perdure list`` as a file: ``python scripts/inspect_requests.py --help``."""

from __future__ import annotations

from perdure.scripts.main import run_file

if __name__ == "__main__":
    run_file("list")
