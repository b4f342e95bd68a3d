"""What users write: tasks, steps, requests, and generators run as a batch. No server and no process."""

from __future__ import annotations

import functools
import pickle
import sys
import types
from collections.abc import Generator, Iterable, Iterator
from typing import Any, cast

import pytest

from perdure.protocol.errors import UnknownTask
from perdure.protocol.tasks import is_task, path_of, resolve
from perdure.workers import BatchTask, InvalidRequest, Request, Step, task
from perdure.workers.engine.engines import as_batch
from perdure.workers.tasks.base import NOTHING, Task
from perdure.workers.tasks.generators import GeneratorBatch

closed: list[str] = []


@task
def count(request: Request) -> Generator[Step, None, Any]:
    """Count."""
    for index in range(request.payload):
        yield Step(output=index, state=index + 1)
    return "done"


@task(slots=4, step_timeout=2.5, reproducible=False)
def special(request: Request) -> Generator[Step, None, Any]:
    """With options."""
    yield Step()


@task
def careful(request: Request) -> Generator[Step, None, Any]:
    """Notes its own closing."""
    try:
        while True:
            yield Step(output=1)
    finally:
        closed.append(request.id)


@task
def wrong(request: Request) -> Any:
    """Does at its second step what the payload says."""
    yield Step(output=0, durable=True)
    if request.payload == "raise":
        raise KeyError("gone")
    if request.payload == "exit":
        sys.exit(3)
    yield request.payload


def plain(request: Request) -> int:
    """No task."""
    return 1


class Batch(BatchTask):
    """A batch task."""

    slots = 2

    def admit(self, request: Request) -> None: ...

    def step(self) -> Iterable[Step]:
        return []

    def drop(self, request_id: str) -> None: ...


named = Batch()


@task
def delegating(request: Request) -> Iterator[Step]:
    """No generator itself: it says what it returns."""
    return iter([Step(output=1)]) if request.payload == "steps" else cast(Iterator[Step], 1)


class Holder:
    """Where a task cannot be imported from."""

    @task
    def method(self: Request) -> Generator[Step, None, None]:
        yield Step()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported: this one, whatever pytest calls it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__))
    return __name__


# --- what is a task, and where it is -------------------------------------------------------------------


def test_the_decorator_keeps_the_function() -> None:
    """A decorated generator function can be called, documented and configured as before."""
    assert isinstance(count, Task)
    assert (vars(count)["__name__"], count.__doc__) == ("count", "Count.")
    assert (count.slots, count.step_timeout, count.reproducible) == (1, None, True)
    assert (special.slots, special.step_timeout, special.reproducible) == (4, 2.5, False)
    assert [step.output for step in count(Request(id="a", payload=2))] == [0, 1]


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"step_timeout": 0}, {"step_timeout": -1}, {"step_timeout": float("nan")}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    """A task without a slot, or without time for a step, is refused where it is written."""
    with pytest.raises(ValueError, match=next(iter(options))):
        task(**options)(count.function)


def test_tasks_are_told_from_other_callables() -> None:
    """Only what task() made, and batch tasks with their classes, are tasks."""
    assert all(is_task(item) for item in (count, Batch, named))
    assert not any(is_task(item) for item in (plain, BatchTask, print, "app.count", None))


def test_a_path_leads_back_to_its_task(here: str) -> None:
    """resolve(path_of(task)) is the task: for functions, classes and instances."""
    for item in (count, Batch, named):
        assert resolve(path_of(item)) is item
    assert repr(count) == f"<task {here}.count>"


def local() -> Task:
    @task
    def hidden(request: Request) -> Generator[Step, None, Any]:
        yield Step()

    return hidden


def test_what_no_worker_can_import_has_no_path() -> None:
    """Plain callables, local functions, lambdas, nameless instances and __main__ are refused, saying why."""
    main = Task(delegating.function)
    main.__module__ = "__main__"
    for item, reason in [
        (plain, "is not a task"),
        (BatchTask, "is not a task"),
        (42, "is not a task"),
        (local(), "top level"),
        (Batch(), "no module-level name"),
        (main, "top level"),
        (Holder.method, r"Holder\.method is a method.* top level"),
    ]:
        with pytest.raises(UnknownTask, match=reason):
            path_of(item)


@pytest.mark.parametrize("function", [plain, lambda request: None, functools.partial(plain), print, Batch])
def test_what_does_not_yield_is_refused_where_it_is_made_a_task(function: Any) -> None:
    """Not at its first request, on a worker. With arguments of the decorator too."""
    for make in (task, task(slots=2), Task):
        with pytest.raises(TypeError, match=r"is not a generator: a task yields"):
            make(function)


def test_what_yields_in_another_way_is_a_task() -> None:
    """A wrapped generator, a part of one, an object that is called; an annotation says what cannot be seen."""

    class Called:
        def __call__(self, request: Request) -> Generator[Step, None, None]:
            yield Step()

    @functools.wraps(count.function)
    def wrapped(request: Request) -> Any:
        return count(request)

    for function in (Called(), wrapped, functools.partial(count.function), delegating.function):
        assert Task(cast(Any, function)).slots == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("count", "not a dotted path"),
        ("no_such_module_at_all.count", "cannot import no_such_module_at_all"),
        ("HERE.missing", "no task named missing"),
        ("HERE.plain", "is a function, not a task"),
        ("os.system", "not a task"),
        ("perdure.workers.BatchTask", "not a task"),
    ],
)
def test_only_tasks_are_resolved(here: str, path: str, reason: str) -> None:
    """A worker never runs any importable callable: what stands at a path must be a task."""
    with pytest.raises(UnknownTask, match=reason):
        resolve(path.replace("HERE", here))


# --- steps and requests --------------------------------------------------------------------------------


def test_nothing_is_not_none() -> None:
    """None is a value of its own; what was left out is NOTHING."""
    step = Step(output=None)
    assert step.output is None
    assert step.state is NOTHING
    assert not NOTHING
    assert repr(NOTHING) == "NOTHING"


def test_a_step_ends_by_a_result_or_an_error() -> None:
    """A result (None too) or an error ends a request; an output or a state does not."""
    assert Step(result=None).ends
    assert Step(error=ValueError()).ends
    assert not Step(output=1, state=2, durable=True).ends


def test_a_request_knows_whether_it_goes_on() -> None:
    """It was resumed when there are outputs or a state, and empty ones count as none only if they are absent."""
    assert not Request(id="a", payload=1).resumed
    assert Request(id="a", payload=1, outputs=[0]).resumed
    assert Request(id="a", payload=1, state=0).resumed


def test_an_invalid_request_names_its_field_after_pickling_too() -> None:
    """The field's name survives the way through a process boundary."""
    error = pickle.loads(pickle.dumps(InvalidRequest("must be positive", "n")))
    assert (str(error), error.field) == ("must be positive", "n")


# --- generators as a batch -----------------------------------------------------------------------------


def advance(batch: BatchTask) -> dict[str, Step]:
    return {step.request_id: step for step in batch.step()}


def test_each_step_advances_all_generators() -> None:
    """One step of the batch is one yield of each; a return value is the result, and the request has left."""
    batch = as_batch(count)
    batch.admit(Request(id="short", payload=1))
    batch.admit(Request(id="long", payload=2))
    assert {name: step.output for name, step in advance(batch).items()} == {"short": 0, "long": 0}
    steps = advance(batch)
    assert (steps["short"].result, steps["long"].output, steps["long"].state) == ("done", 1, 2)
    assert list(advance(batch)) == ["long"]
    assert list(batch.step()) == []


def test_options_reach_the_batch() -> None:
    """Slots, step timeout and reproducibility are those of the task; batch tasks run as they are."""
    batch = GeneratorBatch(special)
    assert (batch.slots, batch.step_timeout, batch.reproducible) == (4, 2.5, False)
    assert as_batch(named) is named
    assert isinstance(as_batch(Batch), Batch)


def test_durable_is_handed_on() -> None:
    """Step(durable=True) stays durable on its way through the batch."""
    batch = as_batch(wrong)
    batch.admit(Request(id="a", payload="raise"))
    assert advance(batch)["a"].durable


@pytest.mark.parametrize(
    ("payload", "kind"), [("raise", KeyError), ("exit", SystemExit), (17, TypeError), (None, TypeError)]
)
def test_what_one_generator_does_is_its_own_failure(payload: Any, kind: type[BaseException]) -> None:
    """An exception, sys.exit or a yield of something else than a Step ends this request and no other."""
    batch = as_batch(wrong)
    batch.admit(Request(id="bad", payload=payload))
    batch.admit(Request(id="good", payload=Step(output=1)))
    advance(batch)
    steps = advance(batch)
    assert isinstance(steps["bad"].error, kind)
    assert steps["good"].output == 1
    assert list(advance(batch)) == ["good"]


def test_a_function_that_is_no_generator_is_refused() -> None:
    """One that says it would return a generator, and does not, fails its request with what to do."""
    batch = as_batch(delegating)
    with pytest.raises(TypeError, match="not a generator"):
        batch.admit(Request(id="a", payload=1))
    assert list(batch.step()) == []


def test_drop_closes_the_generator() -> None:
    """A dropped request's generator runs its finally blocks; an unknown id is ignored."""
    closed.clear()
    batch = as_batch(careful)
    for name in ("one", "two"):
        batch.admit(Request(id=name, payload=None))
    advance(batch)
    batch.drop("one")
    batch.drop("nobody")
    assert closed == ["one"]
    assert list(advance(batch)) == ["two"]
    batch.drop("two")
