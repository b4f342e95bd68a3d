"""``import perdure``: the same package from wherever Python is started, and cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import perdure
from perdure.producer import Client
from tests.kit.lab import Lab
from tests.kit.places import ROOT, TASKS

SHOW = "import perdure, perdure.workers.text; print(perdure.__file__, perdure.workers.text.__name__)"


@pytest.fixture(params=["/", "parent", "clone"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where Python is started: the root, the parent of a clone that is named perdure, and that clone."""
    clone = tmp_path / "perdure"
    clone.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".venv", "build", ".git"):
            (clone / entry.name).symlink_to(entry)
    return {"/": Path("/"), "parent": tmp_path, "clone": clone}[request.param]


def test_by_dash_c_it_is_the_same_package(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SHOW], cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [perdure.__file__, "perdure.workers.text"]


def test_by_dash_m_it_is_the_same_package(place: Path) -> None:
    command = [sys.executable, "-m", "perdure.scripts.main", "--version"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    assert done.stdout == f"perdure, version {perdure.__version__}\n"


def test_by_rq_worker_it_is_the_same_package(lab: Lab, place: Path) -> None:
    """``-w`` and the tasks are imported by RQ's own command; the result says from which file."""
    one = lab.submit("laden", {"n": 1})
    rq = Path(sys.executable).with_name("rq")
    subprocess.run(
        [rq, "worker", "--burst", "-w", "perdure.workers.Worker", "--url", lab.url, "gpu"],
        cwd=place, env={"PYTHONPATH": str(TASKS)}, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert Path(str(lab.store.result(one))).parent.parent == Path(perdure.__file__).parent


HIDDEN = """
import importlib.metadata as metadata

find = metadata.distribution


def distribution(name):
    if name == "perdure":
        raise metadata.PackageNotFoundError(name)
    return find(name)


metadata.distribution = distribution
"""


def test_a_worker_needs_no_record_of_an_installation(lab: Lab, tmp_path: Path) -> None:
    """The folders of a checkout, found by a path alone, are enough."""
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    one = lab.submit("count", {"n": 3})
    lab.worker(environment={"PYTHONPATH": f"{tmp_path}:{TASKS}"})
    lab.check(one, 3)


def test_the_names_are_those_of_their_packages(lab: Lab) -> None:
    """Each is the object itself, and all are shown to who asks for a list."""
    from perdure import AsyncClient, BatchTask, Step, Worker, task
    from perdure.producer import AsyncClient as Async
    from perdure.workers import BatchTask as Batch
    from perdure.workers import Step as One
    from perdure.workers import Worker as Work
    from perdure.workers import task as decorate

    assert (AsyncClient, BatchTask, Step, Worker, task) == (Async, Batch, One, Work, decorate)
    assert set(perdure.__all__) <= set(dir(perdure))
    with perdure.Client(lab.url) as client:
        assert isinstance(client, Client)
    with pytest.raises(AttributeError, match="module 'perdure' has no attribute 'Cleint'"):
        perdure.Cleint  # noqa: B018


def test_importing_it_loads_nothing() -> None:
    """Not even redis: as cheap as can be, until a name is asked for."""
    code = "import sys; before = set(sys.modules); import perdure; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert {name.partition(".")[0] for name in loaded} & {"redis", "rq", "torch", "click"} == set()
    assert [name for name in loaded if name.startswith("perdure")] == ["perdure"]
