"""One model on several ranks: tensor parallelism, exact for a given number of ranks.

Each rank has a part of the heads and of the gated layer's hidden numbers, and the keys of its heads alone; the
embedding, the norms and the head of the model are whole on each. Twice a layer, a product over what is split gives
each rank a part of a sum, and the sum over the ranks goes on. It is made in the order of the ranks, so its bits
depend on nothing but the parts, and all ranks sample the same token. Another number of ranks adds in another
order: its answers may differ, which its fingerprint says.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ....protocol.errors import SettingsError
from ....protocol.settings import Settings
from ...tasks.collectives import Collectives
from ..bundle import Bundle, Shape
from .llama import Llama


class ParallelLlama(Llama):
    """The part of a model that one rank computes. Every rank must call every method, at the same time.

    Keys of a request are [layers, 2 K / ranks, positions, d].
    """

    def __init__(self, bundle: Bundle, device: torch.device, slots: int, group: Collectives) -> None:
        """``bundle``: the whole model. Raises :class:`SettingsError` if the ranks do not divide it."""
        super().__init__(shard(bundle, group.rank, group.world), device, slots)
        self._group = group

    def _whole(self, part: Tensor) -> Tensor:
        return self._group.all_reduce(part)


def place(settings: Settings, group: Collectives) -> Settings:
    """The settings with this rank's own device: one each, where CUDA is asked for."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return settings
    first = int(settings.device.partition(":")[2] or 0)
    return settings.replace(device=f"cuda:{first + group.rank}")


def check_ranks(shape: Shape, world: int) -> None:
    """Raise :class:`SettingsError` if so many ranks do not divide the model, saying how many would."""
    parts = (shape.heads, shape.kv_heads, shape.hidden)
    if any(part % world for part in parts):
        possible = [str(n) for n in range(1, shape.kv_heads + 1) if not any(part % n for part in parts)]
        raise SettingsError(
            f"PERDURE_RANKS={world} does not divide the model: it has {shape.heads} heads, "
            f"{shape.kv_heads} key heads and {shape.hidden} hidden numbers; possible are {', '.join(possible)}"
        )


def shard(bundle: Bundle, rank: int, world: int) -> Bundle:
    """One rank's part of a model, in the layout of a smaller one. Raises as :func:`check_ranks`."""
    check_ranks(bundle.shape, world)
    shape = dataclasses.replace(
        bundle.shape,
        heads=bundle.shape.heads // world,
        kv_heads=bundle.shape.kv_heads // world,
        hidden=bundle.shape.hidden // world,
    )
    return dataclasses.replace(
        bundle,
        shape=shape,
        tensors={name: _part(name, tensor, bundle.shape, rank, world) for name, tensor in bundle.tensors.items()},
    )


def _part(name: str, tensor: Tensor, shape: Shape, rank: int, world: int) -> Tensor:
    def cut(piece: Tensor, dimension: int) -> Tensor:
        return piece.chunk(world, dimension)[rank]

    match name.rpartition(".")[2]:
        case "qkv" | "qkv_bias":
            sizes = [count * shape.head_width for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
            return torch.cat([cut(piece, 0) for piece in tensor.split(sizes)])
        case "gate_up":
            return torch.cat([cut(piece, 0) for piece in tensor.chunk(2)])
        case "out" | "down":
            return cut(tensor, 1).contiguous()
        case _:
            return tensor
