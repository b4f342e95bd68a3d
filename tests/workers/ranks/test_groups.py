"""Groups of real processes over gloo, without Redis: what is computed, and what is left of it when a rank is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from perdure.protocol.errors import SettingsError
from perdure.protocol.settings import Settings
from perdure.protocol.tasks import resolve
from perdure.workers.engine.engines import as_batch
from perdure.workers.ranks.group import Group
from perdure.workers.ranks.membership import RanksDisagree
from perdure.workers.tasks.base import NOTHING, BatchTask, Request
from perdure.workers.text import Generate
from tests.kit.lab import eventually, gone
from tests.kit.places import ROOT, TASKS

torch = pytest.importorskip("torch")

SETTINGS = Settings(model="tiny", device="cpu", threads=1, ranks=2, slots=4)
PAYLOAD: dict[str, Any] = {
    "prompt": "What outlives its process? " * 3, "max_tokens": 24, "temperature": 1.0, "seed": 3, "logprobs": True,
}  # fmt: skip

Started = Callable[..., Group]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Started]:
    """Load a group of one of the tasks beside this file, in a folder of its own; its followers end with the test."""
    monkeypatch.syspath_prepend(str(TASKS))
    monkeypatch.chdir(tmp_path)
    groups = []

    def started(path: str = "group_tasks.Shares", **settings: Any) -> Group:
        task = resolve(path)
        assert isinstance(task, type)
        assert issubclass(task, BatchTask)
        group = Group(task(), Settings(**settings))
        groups.append(group)
        group.load()
        return group

    yield started
    for group in groups:
        group.close()


def run(group: Group, request: Request, *others: Request) -> tuple[list[Any], Any]:
    """A request's new outputs, and its result or error."""
    for each in (request, *others):
        group.admit(each)
    outputs = []
    while True:
        for step in group.step():
            if step.request_id != request.id:
                continue
            if step.output is not NOTHING:
                outputs.append(step.output)
            if step.ends:
                for each in others:
                    group.drop(each.id)
                return outputs, step.error or step.result


def pids(group: Group) -> list[int]:
    return [follower.process.pid for follower in group.followers.everyone.values()]


def shares(n: int, ranks: int = 2) -> list[float]:
    """What Shares gives: float32 sums in the order of the ranks."""
    sums = []
    for index in range(n):
        parts = [torch.tensor([0.1 * (rank + 1) * index]) for rank in range(ranks)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        sums.append(total.item())
    return sums


@pytest.mark.slow
def test_two_ranks_generate_the_same_after_any_cut():
    """Beside others, resumed at several tokens, after a kill -9 of a rank in the middle, and in any epoch."""
    check_generation(SETTINGS)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_two_gpus_generate_the_same_however_they_were_cut_short():
    """The same over NCCL."""
    check_generation(SETTINGS.replace(device="cuda"))


def check_generation(settings: Settings) -> None:
    group = Group(Generate(settings), settings)
    try:
        group.load()
        whole = run(group, Request(id="a", payload=PAYLOAD))
        assert len(whole[0]) == 24
        other = Request(id="b", payload=PAYLOAD | {"seed": 4, "max_tokens": 90})
        for cut in (1, 2, 7, 23):
            outputs, result = run(group, Request(id="a", payload=PAYLOAD, outputs=whole[0][:cut]), other)
            assert (whole[0][:cut] + outputs, result) == whole
        with_kv = run(group, Request(id="a", payload=PAYLOAD | {"kv": True}))
        assert with_kv == whole
        group.admit(Request(id="a", payload=PAYLOAD))
        before: list[Any] = []
        while len(before) < 9:
            before += [step.output for step in group.step() if step.output is not NOTHING]
        (follower,) = pids(group)
        os.kill(follower, signal.SIGKILL)
        last: Any = None
        while not last:
            for step in group.step():
                before += [step.output] if step.output is not NOTHING else []
                last = step.result
        assert (before, last) == whole
        assert (group.collectives.epoch, group.membership.losses) == (2, 1)
        # The number of ranks is in the fingerprint: another one would add in another order.
        alone = Generate(settings.replace(ranks=1))
        alone.load()
        assert group.fingerprint() not in (alone.fingerprint(), group.batch.fingerprint())
        (follower,) = pids(group)
    finally:
        group.close()
    eventually(lambda: gone(follower))


@pytest.mark.slow
def test_a_lost_rank_costs_no_request(start: Started):
    """Of three ranks one is killed: the others stay, and the sums go on where they were."""
    group = start("group_tasks.Three")
    stays, goes = pids(group)
    wrong = {"rank": 2, "index": 3, "how": "SIGKILL"}
    outputs, result = run(group, Request(id="a", payload={"n": 6, "wrong": wrong}), Request(id="b", payload={"n": 99}))
    assert (outputs, result) == (shares(6, 3), "done")
    assert group.collectives.epoch == 2
    assert pids(group)[0] == stays
    assert pids(group)[1] != goes
    # A rank's own error is not a loss: it is told, and the group is whole again for the next request.
    wrong = {"rank": 1, "index": 1, "how": "raise"}
    with pytest.raises(ZeroDivisionError, match="on this rank alone"):
        run(group, Request(id="c", payload={"n": 3, "wrong": wrong}))
    group.drop("c")
    group.drop("b")
    wrong = {"rank": 1, "index": 1, "how": "lie"}
    with pytest.raises(RanksDisagree, match="rank 1 put out something else"):
        run(group, Request(id="d", payload={"n": 3, "wrong": wrong}))
    group.drop("d")
    # What all ranks raise costs no epoch.
    assert run(group, Request(id="e", payload={"n": 3})) == (shares(3, 3), "done")
    epoch = group.collectives.epoch
    with pytest.raises(ArithmeticError, match="on every rank"):
        run(group, Request(id="f", payload={"n": 3, "all": 1}))
    group.drop("f")
    assert run(group, Request(id="g", payload={"n": 3})) == (shares(3, 3), "done")
    assert group.collectives.epoch == epoch


def test_ranks_that_do_not_divide_the_model_are_refused():
    """Saying which numbers would."""
    from perdure.workers.text.model.parallel import check_ranks
    from perdure.workers.text.weights.tiny import SHAPE

    check_ranks(SHAPE, 2)
    with pytest.raises(SettingsError, match=r"PERDURE_RANKS=3 does not divide .* 4 heads, 2 key heads .* are 1, 2$"):
        check_ranks(SHAPE, 3)


def test_a_group_that_cannot_load_leaves_no_process_behind():
    """The leader's error is told, and the followers end."""
    settings = SETTINGS.replace(ranks=3)
    group = Group(Generate(settings), settings)
    before = set(psutil.Process().children())
    with pytest.raises(SettingsError, match="PERDURE_RANKS=3 does not divide the model"):
        group.load()
    assert set(psutil.Process().children()) <= before


def test_the_parts_of_a_model_add_up_to_it():
    """Every row and column is on one rank, in the place that the smaller shape gives it."""
    from perdure.workers.text.model.parallel import shard
    from perdure.workers.text.weights.tiny import tiny

    bundle = tiny(torch.float32)
    parts = [shard(bundle, rank, 2) for rank in range(2)]
    x, inner = torch.randn(5, bundle.shape.width), bundle.shape.hidden
    y = torch.randn(5, inner)
    heads, keys, d = bundle.shape.heads, bundle.shape.kv_heads, bundle.shape.head_width
    for name, tensor in bundle.tensors.items():
        pieces = [part.tensors[name] for part in parts]
        match name.rpartition(".")[2]:
            case "qkv":
                whole = (x @ tensor.T).split([heads * d, keys * d, keys * d], dim=1)
                split = [(x @ piece.T).split([heads * d // 2, keys * d // 2, keys * d // 2], dim=1) for piece in pieces]
                for place in range(3):
                    torch.testing.assert_close(torch.cat([each[place] for each in split], dim=1), whole[place])
            case "gate_up":
                gates = [(x @ piece.T).chunk(2, dim=1) for piece in pieces]
                for place, half in enumerate((x @ tensor.T).chunk(2, dim=1)):
                    torch.testing.assert_close(torch.cat([gate[place] for gate in gates], dim=1), half)
            case "down":
                total = y[:, : inner // 2] @ pieces[0].T + y[:, inner // 2 :] @ pieces[1].T
                torch.testing.assert_close(total, y @ tensor.T)
            case "out":
                torch.testing.assert_close(torch.cat(pieces, dim=1), tensor)
            case _:
                assert all(piece is tensor for piece in pieces)


def test_a_task_of_one_rank_is_no_group():
    """It runs as it did; one with more is wrapped."""
    assert isinstance(as_batch(Generate(Settings(model="tiny"))), Generate)
    group = as_batch(Generate(SETTINGS))
    assert isinstance(group, Group)
    assert group.slots == SETTINGS.slots


ORPHAN = """
    import subprocess, sys
    from datetime import timedelta
    import torch
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
    rank, port = (1, int(sys.argv[1])) if len(sys.argv) > 1 else (0, 0)
    store = TCPStore("127.0.0.1", port, is_master=not rank, wait_for_workers=False)
    if rank == 0:
        other = subprocess.Popen([sys.executable, __file__, str(store.port)])
    options = ProcessGroupGloo._Options()
    options._devices, options._timeout = [ProcessGroupGloo.create_device(hostname="127.0.0.1")], timedelta(seconds=60)
    group = ProcessGroupGloo(PrefixStore("epoch1", store), rank, 2, options)
    x = torch.tensor([100.0])
    if rank == 0:
        try:
            group.allreduce([torch.tensor([1.0])]).wait(timedelta(seconds=0.2))  # "is the other one healthy?"
        except RuntimeError:
            print("the health check timed out", flush=True)
        store.set("go on", "")
        try:
            group.allreduce([x]).wait(timedelta(seconds=60))
        except RuntimeError:
            pass
        other.wait()
    else:
        store.wait(["go on"])
        group.allreduce([x]).wait()
        print("100 + 100 =", int(x.item()), flush=True)
"""


@pytest.mark.slow
def test_a_one_sided_collective_corrupts_the_next_one(tmp_path):
    """Why no health check issues one: what it leaves behind is added to a real sum, and nobody is told."""
    script = tmp_path / "orphan.py"
    script.write_text(textwrap.dedent(ORPHAN))
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert found.stdout.splitlines() == ["the health check timed out", "100 + 100 = 101"], found.stderr


def test_only_the_collectives_themselves_use_the_library():
    """Neither a health check nor anything else of ours can issue a collective behind a task's back."""
    users = {
        str(path.relative_to(ROOT))
        for folder in ("workers", "recovery", "scripts", "protocol", "producer")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(
            r"import distributed|ProcessGroup\w+|\.(all_?reduce|all_?gather|broadcast|barrier)\(", path.read_text()
        )
    }
    # The report of a GPU measures them, in a task and a group of its own.
    report = {"scripts/gpu_report/tasks.py", "scripts/gpu_report/steps/ranks.py"}
    assert users - report == {"workers/tasks/collectives.py", "workers/text/model/parallel.py"}
