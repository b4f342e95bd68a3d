"""Releases of Perdure that run beside the working tree, each in a virtual environment of its own.

0.1.0 and 0.2.0 are namespace packages: put in front of the path they lose to a regular package that comes later, and
"old" processes would run the code of the tree. So nothing of the tree is in these environments, and every process in
them ends at once unless the code that it would import is that of its release.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import zipfile
from pathlib import Path

from tests.kit.places import TESTS

WHEELS = tuple(sorted((TESTS / "releases").glob("*.whl")))

_CHECK = """\
import importlib.util, os, sys
try:
    place = os.path.realpath(importlib.util.find_spec("perdure.protocol.keys").origin)
except Exception as error:
    place = repr(error)
if not place.startswith({home!r} + os.sep):
    print("this is not the release:", place, file=sys.stderr, flush=True)
    os._exit(86)
"""


def version_of(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def environment_of(wheel: Path, folder: Path) -> Path:
    """Make an environment with a release and all that the tests' own has installed; returns its Python."""
    own = Path(sysconfig.get_path("purelib"))
    site = folder / own.relative_to(sys.prefix)
    site.mkdir(parents=True)
    for entry in own.iterdir():
        # Not what leads to the tree: the editable installation's files and the checkout's .pth are named after it.
        # Not __pycache__: environments with one in common take each other's check, compiled, for their own.
        if not re.match(r"(__editable__[._]+)?perdure|__pycache__$", entry.name):
            (site / entry.name).symlink_to(entry)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # By a line that site runs: a sitecustomize here would be hidden by that of a distribution's Python.
    (site / "_perdure_release.py").write_text(_CHECK.format(home=os.path.realpath(site)), encoding="utf-8")
    (site / "_perdure_release.pth").write_text("import _perdure_release\n", encoding="utf-8")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(os.path.realpath(sys.executable))
    home = Path(os.path.realpath(sys.executable)).parent
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n", encoding="utf-8")
    return python
