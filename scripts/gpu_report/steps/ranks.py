"""Groups on one device: two ranks that speak by gloo, and NCCL, which wants a device for each rank, with one."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Final

import torch

from ....protocol.settings import Settings
from ....workers.ranks.group import Group
from ....workers.tasks.base import NOTHING, Request
from ....workers.tasks.collectives import Collectives, serve
from ..stage import ReportStage
from ..tasks import Halves

TIMEOUT: Final = 15.0


def ranks(stage: ReportStage) -> None:
    """A rank is killed in the middle: the sums are the same. Then a group is aborted, and forms anew."""
    os.environ["PERDURE_DEVICE"] = stage.device  # the task reads it, in each rank
    group = Group(Halves(), Settings(device=stage.device, threads=1))
    began = time.monotonic()
    try:
        group.load()
        stage.note(two_ranks_form_s=time.monotonic() - began)
        whole, _ = _run(group, "whole")
        outputs, pause = _run(group, "killed", kill_at=10)
        stage.expect("two ranks give the same sums after one was killed", outputs == whole)
        stage.expect("the group forms anew once", (group.collectives.epoch, group.membership.losses) == (2, 1))
        stage.note(sums=len(whole), next_output_after_a_kill_s=pause)
    finally:
        group.close()
    stage.needs_cuda("NCCL; here the group of one rank is gloo's")
    _one_rank(stage)


def _run(group: Group, name: str, kill_at: int = -1) -> tuple[list[float], float]:
    """All outputs of one request, and the longest time between two."""
    group.admit(Request(id=name, payload={}))
    outputs: list[float] = []
    last, longest, ended = time.monotonic(), 0.0, False
    while not ended:
        for step in group.step():
            if step.output is not NOTHING:
                outputs.append(step.output)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            ended = ended or step.ends
        if len(outputs) == kill_at:
            kill_at = -1
            (follower,) = group.followers.everyone.values()
            os.kill(follower.process.pid, signal.SIGKILL)
    return outputs, longest


def _one_rank(stage: ReportStage) -> None:
    collectives = Collectives(0, 1, TIMEOUT)
    device = torch.device(stage.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        collectives.use(device)
    store = serve()
    numbers = torch.arange(1024, dtype=torch.float32, device=device)
    for epoch in (1, 2):
        began = time.monotonic()
        collectives.form(epoch, store)
        found = _gathered(collectives, numbers)
        seconds = time.monotonic() - began
        stage.expect(f"epoch {epoch} gathers what was given", torch.equal(found, numbers))
        began = time.monotonic()
        collectives.abort()
        stage.row(f"one rank, epoch {epoch}", {"form_and_gather_s": seconds, "abort_s": time.monotonic() - began})


def _gathered(collectives: Collectives, numbers: torch.Tensor) -> Any:
    # Not all_gather(), which leaves the library out where there is one rank.
    parts = [torch.empty_like(numbers)]
    collectives.process_group.allgather([parts], [numbers]).wait()
    if numbers.device.type == "cuda":
        torch.cuda.synchronize()
    return parts[0]
