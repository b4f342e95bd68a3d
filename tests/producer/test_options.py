"""The options of a submit stand in one place: what takes them has its names, types and descriptions from there."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import click
import fakeredis
import pytest

from perdure.producer import AsyncClient, Client
from perdure.producer.options import OF_ONE, Common, Options, sentence
from perdure.protocol.errors import InvalidRequest
from perdure.protocol.settings import Settings
from perdure.scripts.batch.command import run
from perdure.scripts.cli.submitting import submit

PATH = "app.tasks.count"
NAMES = {item.name for item in fields(Options)}
COMMON = {item.name for item in fields(Common)}


def flags(command: click.Command) -> dict[str, click.Option]:
    return {item.name: item for item in command.params if isinstance(item, click.Option) and item.name}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_methods_take_every_option_and_describe_it(kind: Any) -> None:
    for method, names in ((kind.submit, NAMES), (kind.submit_many, COMMON)):
        taken = inspect.signature(method).parameters
        assert {name for name, item in taken.items() if item.kind is item.KEYWORD_ONLY} == names
        for item in fields(Options):
            if item.name in names:
                assert taken[item.name].default == item.default
                assert f"    {item.name}: {item.metadata['help'][:20]}" in method.__doc__
    assert list(inspect.signature(kind.submit).parameters)[:3] == ["self", "task", "payload"]


def test_the_command_has_a_flag_for_every_option() -> None:
    shown = flags(submit)
    assert set(shown) - {"wait", "stream", "timeout", "as_json", "url", "help"} == NAMES
    for item in fields(Options):
        assert (shown[item.name].default, shown[item.name].help) == (item.default, sentence(item))
    assert flags(run)["priority"].help == flags(submit)["priority"].help


def test_an_item_has_every_option_but_those_of_the_call() -> None:
    assert NAMES - set(OF_ONE) == {"retry_when_degraded"}
    with Client(connection=fakeredis.FakeRedis(), settings=Settings()) as client:
        for name, text in (
            ("retry_when_degraded", "not an option of a request"),
            ("queue_time", "did you mean 'queue_timeout'"),
        ):
            with pytest.raises(InvalidRequest, match=text) as caught:
                client.submit_many([{"task": PATH, "payload": 1, name: True}])
            assert caught.value.field == name
        # What an item says comes before what all of them have.
        one, other = client.submit_many(
            [(PATH, 1), {"task": PATH, "payload": 2, "queue": "b"}], queue="a", max_retries=0
        )
        assert [handle.record().queue for handle in (one, other)] == ["a", "b"]
        assert [handle.details().retries_left for handle in (one, other)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((PATH, 1), {"queu": "gpu"}, r"submit\(\) got an unexpected keyword argument 'queu'"),
        ((PATH,), {}, r"submit\(\) missing 1 required positional argument: 'payload'"),
        ((PATH, 1, "gpu"), {}, r"submit\(\) takes 3 positional arguments but 4 were given"),
    ],
)
def test_wrong_arguments_are_told_as_python_does(arguments: Any, options: dict[str, Any], text: str) -> None:
    with Client(connection=fakeredis.FakeRedis(), settings=Settings()) as client, pytest.raises(TypeError, match=text):
        client.submit(*arguments, **options)
