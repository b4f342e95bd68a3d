"""Collectives among the ranks of a group: gloo between CPUs, NCCL between GPUs.

A group has *epochs*. Each has a process group of its own, under a store prefix of its own, so that no
message of one can be met in another. An epoch in which a rank died or a collective timed out is aborted, never
destroyed: ``destroy_process_group`` waits for the dead.

Only a task's own step issues collectives, all ranks at the same place. A health check never does: a
collective that only one rank takes part in stays queued, and what the others issue next is added to it.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from ...protocol.errors import SettingsError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

HOST: Final = "127.0.0.1"
"""The ranks of a group are processes of one host."""


class CollectiveFailed(Exception):
    """A rank is gone, or did not come to a collective in time. Ends the epoch; catching it does not help."""


class Collectives:
    """One rank's place in its group; a task finds it as ``self.group``.

    ``rank`` counts from 0, the leader, whose outputs are those of the group; ``world`` is the number of ranks. Sums
    are made in the order of the ranks, so that they have the same bits on every rank and in every epoch.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        """``timeout``: seconds that one collective may take."""
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.epoch = 0
        self.broken = ""
        """What the first collective that failed in this epoch said."""
        self._device: Any = None
        self._group: Any = None

    def use(self, device: torch.device) -> None:
        """Say in ``load`` where the tensors are. Without it, they are on the CPU.

        Raises :class:`~perdure.protocol.errors.SettingsError` when there is no device for each rank: NCCL refuses
        two ranks on one.
        """
        import torch

        if device.type == "cuda" and torch.cuda.device_count() < self.world:
            raise SettingsError(
                f"PERDURE_RANKS={self.world} needs so many CUDA devices, but this process sees "
                f"{torch.cuda.device_count()}; give the worker more of them in CUDA_VISIBLE_DEVICES, or set fewer ranks"
            )
        self._device = device

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in their order; all have the same shape and dtype.

        Raises :class:`CollectiveFailed`.
        """
        import torch

        tensor = tensor.contiguous()
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        group = self.process_group
        try:
            group.allgather([parts], [tensor]).wait()
        except RuntimeError as error:
            self.broken = self.broken or _line(error)
            raise CollectiveFailed(f"all_gather of epoch {self.epoch} failed on rank {self.rank}: {error}") from error
        return parts

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each. Raises :class:`CollectiveFailed`.

        Not the library's ``allreduce``: that adds in an order which depends on the place of a number in the tensor, as
        soon as there are three ranks, and a row's sum must not depend on the slot it is in.
        """
        first, *others = self.all_gather(tensor)
        for part in others:
            first = first + part
        return first

    @property
    def process_group(self) -> Any:
        """The process group of this epoch. Raises :class:`CollectiveFailed` when there is none.

        For collectives that are not above. A failure of one that is issued here is told from an error of the task only
        by a rank that is gone.
        """
        if self._group is None:
            raise CollectiveFailed(
                f"rank {self.rank} is in no epoch; collectives may be used in meet(), admit() and step()"
            )
        return self._group

    # --- for the group ---------------------------------------------------------------------------------

    def form(self, epoch: int, store: Store) -> None:
        """Meet the other ranks in a new epoch. Raises :class:`CollectiveFailed`."""
        from torch import distributed

        self.abort()
        self.epoch, self.broken = epoch, ""
        prefix = distributed.PrefixStore(f"epoch{epoch}", store)
        timeout = timedelta(seconds=self.timeout)
        try:
            if self._device is not None and self._device.type == "cuda":
                self._group = _nccl(prefix, self.rank, self.world, timeout, self._device)
            else:
                self._group = _gloo(prefix, self.rank, self.world, timeout)
        except RuntimeError as error:
            self.broken = _line(error)
            raise CollectiveFailed(f"epoch {epoch} did not form on rank {self.rank}: {error}") from error

    def interrupt(self) -> None:
        """End what is in flight in this epoch, from another thread. gloo has no such thing: there, nothing happens."""
        group = self._group
        if group is not None:
            group.abort()

    def abort(self) -> None:
        """Leave the epoch without a word to the others. Any thread; does not wait for a peer."""
        group, self._group = self._group, None
        if group is not None:
            # NCCL: ends what is in flight. gloo: its sockets are closed with the last reference, which ends the peers'.
            group.abort()


def serve() -> Store:
    """The store in which the ranks of all epochs meet, served by this process on the loopback interface alone."""
    from torch import distributed

    listening = socket.create_server((HOST, 0))
    return distributed.TCPStore(
        HOST, listening.getsockname()[1], is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def reach(port: int, timeout: float) -> Store:
    """The leader's store. Raises :class:`CollectiveFailed` if it does not answer in ``timeout`` seconds."""
    from torch import distributed

    try:
        return distributed.TCPStore(
            HOST, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
    except RuntimeError as error:
        raise CollectiveFailed(f"the leader's store does not answer: {error}") from error


def _gloo(store: Store, rank: int, world: int, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupGloo

    # By default it asks for the name of the host, which a container may not have.
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, world, options)


def _nccl(store: Store, rank: int, world: int, timeout: timedelta, device: torch.device) -> Any:
    import torch

    # wait() must raise on a timeout, and nothing but the group may end the process: by default NCCL's own
    # watchdog tears it down without aborting anything.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    from torch.distributed import ProcessGroupNCCL  # absent from builds for the CPU

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    torch.cuda.set_device(device)
    return ProcessGroupNCCL(store, rank, world, options)


def _line(error: BaseException) -> str:
    """The first line of a library's message, which goes on with its C++ frames."""
    return str(error).strip().partition("\n")[0][:300]
