"""What a producer and a worker both know of tasks: what is one, its dotted path, and its check of a payload at submit.

The tasks that users write (:mod:`perdure.workers`) are built on these classes.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

from .codec import article
from .errors import UnknownTask


class FunctionTask:
    """A function that workers run. ``@perdure.workers.task`` makes one."""


class ClassTask:
    """What workers make an instance of, and run. :class:`perdure.workers.BatchTask` is the only class right below."""

    def prepare(self, payload: Any) -> Any:
        """Check and complete a payload at submit, where the producer has this task at hand.

        Returns the payload to store. Raises :class:`InvalidRequest` with the field's name. The
        worker must check again in :meth:`admit`: a producer that knows only the dotted path stores
        what it was given.
        """
        return payload


TaskLike = FunctionTask | ClassTask | type[ClassTask]
"""What a client may submit, besides a dotted path."""


def is_task(candidate: object) -> bool:
    """True for what a worker runs: a task function, an instance of a batch task, or its class."""
    if isinstance(candidate, type):
        # Neither that class nor BatchTask, the one right below it, has anything to run.
        return issubclass(candidate, ClassTask) and candidate is not ClassTask and ClassTask not in candidate.__bases__
    return isinstance(candidate, FunctionTask | ClassTask)


def path_of(candidate: object) -> str:
    """The dotted path under which workers import a task.

    Raises :class:`UnknownTask` for what is no task, or stands where no other process can import it.
    """
    if not is_task(candidate):
        name = getattr(candidate, "__qualname__", None) or repr(candidate)
        raise UnknownTask(
            f"{name} is not a task: put @perdure.workers.task above a generator function, "
            "or derive a class from perdure.workers.BatchTask"
        )
    module = candidate.__module__
    if isinstance(candidate, ClassTask):
        owner = sys.modules.get(module)
        names = [name for name, value in vars(owner).items() if value is candidate] if owner else []
        if not names:
            raise UnknownTask(
                f"this {type(candidate).__name__} instance has no module-level name in {module}; "
                "submit it by its dotted path"
            )
        qualname = names[0]
    else:
        qualname = candidate.__qualname__  # type: ignore[attr-defined]
        if isinstance(candidate, FunctionTask) and "." in qualname and "<locals>" not in qualname:
            raise UnknownTask(
                f"{module}.{qualname} is a method, or a class attribute; move it to the top level of {module}"
            )
    if module == "__main__" or "<locals>" in qualname:
        raise UnknownTask(f"{module}.{qualname} cannot be imported by a worker; move it to the top level of a module")
    return f"{module}.{qualname}"


def prepared(task: object, payload: Any) -> Any:
    """The payload as a task has checked and completed it. Raises what its ``prepare`` raises; ``None`` has none."""
    if isinstance(task, type) and issubclass(task, ClassTask):
        # Making an instance may take long: only for a check of its own.
        task = None if task.prepare is ClassTask.prepare else task()
    return task.prepare(payload) if isinstance(task, ClassTask) else payload


def resolve(path: str) -> Any:
    """Import the task at a dotted path. Which classes of tasks there are is for workers to know.

    Raises :class:`UnknownTask` when nothing can be imported from there, or when what stands there
    is not a task: a worker never runs any importable callable.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UnknownTask(f"{path!r} is not a dotted path to a task, such as app.tasks.count")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnknownTask(f"cannot import {module_name} for the task {path}: {error}") from error
    try:
        candidate = getattr(module, attribute)
    except AttributeError:
        text = f"module {module_name} has no task named {attribute}"
        if place := _added(module, attribute):
            text += f", but {place} has it by now: this process loaded it before; restart it"
        raise UnknownTask(text) from None
    if not is_task(candidate):
        raise UnknownTask(
            f"{path} is {article(type(candidate).__name__)}, not a task; workers run only objects made with "
            "@perdure.workers.task or derived from perdure.workers.BatchTask"
        )
    return candidate


def _added(module: object, name: str) -> str:
    """The file of a loaded module, if a name stands in it by now that the module does not have; else an empty text."""
    place = getattr(module, "__file__", None)
    if not isinstance(place, str):
        return ""
    try:
        tree = ast.parse(Path(place).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return place
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return place
    return ""
