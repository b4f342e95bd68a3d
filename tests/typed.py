"""What type checkers say of a user's code. Only mypy reads this; it also reports an ignored error that is none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from perdure.producer import Client
from perdure.workers import Request, Step, task


@task
def count(request: Request) -> Iterator[Step]:
    """An iterator of steps is a task's function."""
    yield Step(output=1)


@task(slots=2)
async def listen(request: Request) -> AsyncIterator[Step]:
    """An asynchronous one as well."""
    yield Step(output=1)


def submit(client: Client) -> None:
    """A priority that is none is found before anything runs."""
    client.submit(count, {}, priority="high").result(None)
    client.submit_many([(count, None)], priority="urgent")  # type: ignore[arg-type]
    client.submit(count, {}, priority="urgent")  # type: ignore[arg-type]
