"""The GPU that kernels run on: what decisions need to know of it, and what every launch asks."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

import cutlass_ops
from sdgp_accel.backends import FIRST_SPARSE_CAPABILITY, build_command

HOPPER = (9, 0)
# Machine code runs on GPUs of the same major capability, but neither way between a Tegra and others (CUDA C++
# Programming Guide, binary compatibility): a Jetson Orin.
TEGRA = (8, 7)
WGMMA_ARCHS = {"90a", "compute_90a"}  # a build for one of these holds the kernels that only Hopper runs


class Device(NamedTuple):
    """What decisions and launches need to know of a GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    wgmma: bool = False  # a Hopper, and the build holds the kernels for it
    shared_bytes: int | None = None  # that a thread block may have; None: known by the compute capability


# How many multiprocessors torch is told to leave to others, None for none; not to be asked for before torch 2.7.
_carveout: Callable[[], int | None] = getattr(torch._C, "_get_sm_carveout_experimental", lambda: None)


def device_facts(device: torch.device) -> Device:
    """Of a CUDA device, without the multiprocessors that ``torch._C._set_sm_carveout_experimental`` takes from matrix
    products. The Hopper kernels have as many thread blocks as there are: those that find theirs taken, by NCCL say,
    would begin when the first ones are done, and a product take twice as long.
    """
    facts, carveout = hardware(device), _carveout()
    return facts._replace(multiprocessors=max(facts.multiprocessors - carveout, 1)) if carveout else facts


@functools.cache
def hardware(device: torch.device) -> Device:
    """All there is of a CUDA device; asked once."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    wgmma = capability == HOPPER and not WGMMA_ARCHS.isdisjoint(cutlass_ops.ARCHS)
    return Device(capability, properties.multi_processor_count, wgmma, shared_bytes(properties))


def shared_bytes(properties: Any) -> int | None:
    """`Device.shared_bytes`, as torch tells it from 2.7 on. properties: of a CUDA device."""
    found: int | None = getattr(properties, "shared_memory_per_block_optin", None)
    return found


@functools.cache
def launch_problem(device: torch.device) -> str:
    """What CUDA says where the extension cannot launch on `device`; empty where it can.

    Whatever it is built for: the driver may be older than its CUDA runtime, or than its PTX.
    """
    with on_device(device):
        problem: str = cutlass_ops.kernels().device_problem()
    return problem


def own_arch(capability: tuple[int, int]) -> str:
    """What to build for on a GPU of this compute capability, as in SDGP_CUDA_ARCHS."""
    return "".join(map(str, capability)) + ("a" if capability == HOPPER else "")


def sparse_gpus() -> dict[tuple[int, int], int]:
    """The compute capabilities of the GPUs here that multiply 2:4 operands in hardware, and the first GPU of each."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return {}
    found: dict[tuple[int, int], int] = {}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability >= FIRST_SPARSE_CAPABILITY:
            found.setdefault(capability, index)
    return found


def build_command_for(capabilities: Iterable[tuple[int, int]]) -> str:
    """What builds the kernels for GPUs of these compute capabilities, in the root of a checkout."""
    archs = ";".join(map(own_arch, capabilities))
    return f"SDGP_CUDA_ARCHS={shlex.quote(archs)} {build_command()}" if archs else build_command()


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `arch`, as in SDGP_CUDA_ARCHS, runs on a GPU of this compute capability."""
    number = arch.removeprefix("compute_")
    version = (int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1]))
    if number.endswith("a"):  # features of one architecture, which no other has
        return version == capability
    if arch.startswith("compute_") and not number.endswith("f"):  # PTX: the driver compiles it for what came later
        return version <= capability
    if TEGRA in (version, capability):
        return version == capability
    return version[0] == capability[0] and version <= capability  # that of a family ("f"), too


def stream_of(device: torch.device) -> int:
    """The address of torch's current stream on a CUDA device."""
    # What torch.cuda.current_stream(device).cuda_stream is, without making an object of it.
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream


_HERE = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which autograd sets but a direct call may not have."""
    return _HERE if current_device() == device.index else torch.cuda.device(device)


def current_device() -> int:
    """The index of the current CUDA device."""
    # What torch.cuda.current_device() asks, once it has seen to it that there is a CUDA context.
    index: int = torch._C._cuda_getDevice()
    return index
