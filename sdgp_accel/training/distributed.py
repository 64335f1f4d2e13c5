"""The processes that train together: one, or as many as ``torchrun`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that logs and saves."""
        return self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model` as it is in one process, wrapped in DistributedDataParallel in several."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank, in the main process; an empty list in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main process's buffers: BatchNorm's statistics, which differ after a step."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """The world that ``torchrun`` described in the environment (NCCL on GPUs, Gloo on CPUs), or one process.

    A process group that exists already is used and left as it is: a script that trains several times must make
    its own, since torch cannot set up a second one safely under one ``torchrun``.

    `device` is ``"cuda"`` (this process's GPU), ``"cpu"``, or None for the first of them that there is. Raises
    ValueError for ``"cuda"`` without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or None on a machine without a GPU that torch can use; got 'cuda'")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    if "RANK" not in os.environ:
        yield World(0, 1, place)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
        # Also in a group that stays: the script may end next, and a process that ends first takes the connections of
        # the others with it.
        dist.barrier()
    finally:
        if ours:
            dist.destroy_process_group()
