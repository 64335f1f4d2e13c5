"""The simulator as an engine for kernel tests: torch tensors in simulated device memory, libraries bound to the
simulated runtime.

engine = SimEngine()
library = engine.load(path)                  # a C shared library linked with -cudart shared
x, y = engine.put(torch.randn(8)), engine.empty(8)
with engine.checked():
    status = library.some_launcher(pointer(x), pointer(y), None)
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from .machine import Choice
from .memory import LIVE, READY
from .runtime import Runtime
from .wave import Counters


class SimEngine:
    """Each tensor is an allocation of its own between guard bytes; bytes that nothing has written are known as such."""

    name = "sim"
    device = torch.device("cpu")

    def __init__(self, compute_capability: tuple[int, int] = (8, 0)) -> None:
        self.runtime = Runtime.get()
        self.compute_capability = compute_capability

    def load(self, path: Path | str) -> ctypes.CDLL:
        self.runtime.select(self.compute_capability)
        return self.runtime.load(Path(path))

    def load_module(self, path: Path | str, name: str) -> ModuleType:
        self.runtime.select(self.compute_capability)
        return self.runtime.load_module(Path(path), name)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised contiguous tensor: reading it in a kernel before writing it is a fault."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        address = self.runtime.memory.allocate(size)
        buffer = (ctypes.c_uint8 * size).from_address(address)
        ctypes.memset(address, 0xFF, size)
        weakref.finalize(buffer, self.runtime.memory.free, address)
        return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy in simulated device memory."""
        out = self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
        self.initialised(out)
        return out

    def initialised(self, tensor: torch.Tensor) -> None:
        """Declares all of a tensor written (by host code)."""
        if tensor.numel():
            self.runtime.memory.mark(tensor.data_ptr(), tensor.numel() * tensor.itemsize, READY)

    def reserve(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any size of which kernels may access nothing before `open`; only what is touched takes memory."""
        data = self.runtime.memory.reserve(torch.Size(shape).numel() * dtype.itemsize)
        view = data[:]  # what the tensor keeps alive; the memory itself holds `data`
        weakref.finalize(view, self.runtime.memory.unregister, data.ctypes.data)
        return torch.from_numpy(view).view(dtype).view(shape)

    def open(self, part: torch.Tensor, contents: torch.Tensor | None = None) -> torch.Tensor:
        """Lets kernels access a part of a reserved tensor, filled with `contents` or else to be written first.

        part: a view of any shape whose last dimension is contiguous. Returns it.
        """
        rows = [()] if part.is_contiguous() else itertools.product(*map(range, part.shape[:-1]))
        for row in map(part.__getitem__, rows):
            if contents is None:
                row.view(torch.uint8).fill_(0xFF)
            self.runtime.memory.mark(row.data_ptr(), row.numel() * row.itemsize, LIVE if contents is None else READY)
        return part if contents is None else part.copy_(contents)

    def register(self, tensor: torch.Tensor) -> None:
        """Makes an ordinary CPU tensor's storage accessible to kernels, as initialised memory."""
        storage = tensor.untyped_storage()
        self.runtime.memory.register(storage.data_ptr(), storage.nbytes())

    def unregister(self, tensor: torch.Tensor) -> None:
        self.runtime.memory.unregister(tensor.untyped_storage().data_ptr())

    def check(self) -> None:
        """Raises the fault of a launch that failed since the last check."""
        self.runtime.check()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Raises a kernel's fault in place of whatever the host code made of the failed launch."""
        self.runtime.select(self.compute_capability)
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()

    @contextmanager
    def poisoned_shared(self) -> Iterator[None]:
        """Within: loads of never-written shared memory give NaN patterns instead of a fault."""
        self.runtime.poison_shared = True
        try:
            yield
        finally:
            self.runtime.poison_shared = False

    @contextmanager
    def only_blocks(self, choice: Choice) -> Iterator[None]:
        """Within: launches run only the blocks that `choice` names, of kernels in clusters the blocks' clusters."""
        self.runtime.choice = choice
        try:
            yield
        finally:
            self.runtime.choice = None

    @contextmanager
    def following_global_memory(self) -> Iterator[None]:
        """Within: races between CTAs on global memory are faults (`global_races`)."""
        races = self.runtime.memory.races
        races.follows = True
        try:
            yield
        finally:
            races.follows = False

    def counters(self) -> Counters:
        """Traffic of all launches since the last call."""
        total = Counters()
        for launch in self.runtime.launches:
            total.add(launch.counters)
        self.runtime.launches.clear()
        return total


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
