"""What type checkers say of a user's code. Only mypy reads this; it also reports an ignored error that is none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from perdure.producer import AsyncClient, Client
from perdure.workers import Request, Step, task


@task
def count(request: Request) -> Iterator[Step]:
    """An iterator of steps is a task's function."""
    yield Step(output=1)


@task(slots=2)
async def listen(request: Request) -> AsyncIterator[Step]:
    """An asynchronous one as well."""
    yield Step(output=1)


async def submit(client: Client, other: AsyncClient) -> None:
    """A priority that is none is found before anything runs, and so is an option that is none."""
    client.submit(count, {}, priority="high").result(None)
    client.submit_many([(count, None)], priority="urgent")  # type: ignore[arg-type]
    client.submit(count, {}, priority="urgent")  # type: ignore[arg-type]
    client.submit(task=count, payload={}, queue_timeout=3, meta={"a": 1}).result(None)
    client.submit(count, {}, queu="gpu")  # type: ignore[call-arg]
    client.submit(count)  # type: ignore[call-arg]
    client.submit_many([(count, None)], id="a")  # type: ignore[call-arg]
    (await other.submit(count, {}, delay=3)).id.upper()
    await other.submit(count, {}, delay="3 s")  # type: ignore[arg-type]
    (await other.submit_many([(count, None)], delay=3))[0].id.upper()
