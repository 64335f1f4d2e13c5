"""The simulated CUDA runtime: what host code can ask of it, and what it refuses."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from . import elf
from .toolchain import HERE, build_library

SOURCE = HERE / "kernels" / "runtime.cu"
INVALID_VALUE, INVALID_CONFIGURATION, INVALID_POINTER = 1, 9, 17


@pytest.fixture(scope="module")
def library(sim):
    lib = sim.load(build_library(SOURCE))
    lib.message.restype = ctypes.c_char_p
    return lib


def _launch(sim, library, n: int = 100, block: int = 64, shared: int = 256, allow: int = 0) -> tuple[int, torch.Tensor]:
    from .engine import pointer

    y = sim.empty(n)
    with sim.checked():
        return library.launch(pointer(y), n, block, shared, allow), y


def test_symbols_are_initialised_and_writable(sim, library):
    from .engine import pointer

    status, y = _launch(sim, library)
    assert status == 0
    assert y[:5].tolist() == [6, 7, 8, 9, 6]
    assert library.set_symbols(-1, pointer(torch.tensor([10.0, 20.0, 30.0, 40.0]))) == 0
    assert _launch(sim, library)[1][:5].tolist() == [9, 19, 29, 39, 9]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"block": 2048}, INVALID_CONFIGURATION),
        ({"block": 512}, INVALID_VALUE),  # above the kernel's __launch_bounds__
        ({"shared": 64 * 1024}, INVALID_VALUE),  # not asked for
        ({"shared": 64 * 1024, "allow": 64 * 1024}, 0),
        ({"allow": 200 * 1024}, 1000 + INVALID_VALUE),  # more than an A100 has
    ],
)
def test_launch_limits(sim, library, arguments, expected):
    assert _launch(sim, library, **arguments)[0] == expected
    assert library.last_error() == (INVALID_VALUE if expected >= 1000 else 0)
    assert library.last_error() == 0


def test_memory(sim, library):
    from .engine import pointer

    x, y = torch.randn(33), torch.zeros(33)
    assert library.allocate(pointer(x), pointer(y), 33) == INVALID_POINTER
    library.last_error()
    assert torch.equal(x, y)


def test_fault_reaches_the_host_as_an_error_with_its_text(sim, library):
    from .faults import SimError

    y = torch.zeros(100)  # not device memory
    status = library.launch(ctypes.c_void_p(y.data_ptr()), 100, 64, 256, 0)
    assert status == 719
    assert b"out-of-bounds" in library.message(status)
    with pytest.raises(SimError, match="no allocation there"):
        sim.check()
    sim.check()  # told once
    sim.register(y)
    assert library.launch(ctypes.c_void_p(y.data_ptr()), 100, 64, 256, 0) == 0
    assert y.any()
    sim.unregister(y)


def test_freed_memory_is_out_of_bounds(sim, library):
    from .engine import pointer
    from .faults import SimError

    y = sim.empty(100)
    address = pointer(y)
    del y
    with pytest.raises(SimError, match="out-of-bounds"), sim.checked():
        library.launch(address, 100, 64, 256, 0)


def test_chosen_blocks_of_a_launch_on_reserved_memory(sim, library):
    from .engine import pointer
    from .faults import SimError

    n, block = (1 << 31) - 500, 256
    last = (n - 1) // block
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = sim.reserve(n, dtype=torch.float32)  # 8 GiB
    ends = [sim.open(y[:block]), sim.open(y[last * block :])]
    with sim.only_blocks(lambda kernel, grid: [(0, 0, 0), (grid[0] - 1, 0, 0)]), sim.checked():
        assert library.launch(pointer(y), n, block, 1024, 0) == 0
    assert all((part > 0).all() for part in ends)
    assert not y[block : 2 * block].any()
    with (
        pytest.raises(SimError, match=r"out-of-bounds[^$]*block \(1, 0, 0\)"),
        sim.only_blocks(lambda kernel, grid: [(1, 0, 0)]),
        sim.checked(),
    ):
        library.launch(pointer(y), n, block, 1024, 0)
    with pytest.raises(ValueError, match="grid"), sim.only_blocks(lambda kernel, grid: [grid]), sim.checked():
        library.launch(pointer(y), n, block, 1024, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
    address = y.data_ptr()
    del y, ends
    assert sim.runtime.memory.find(address) is None


def test_ptx_of_another_architecture_is_refused(sim):
    from .faults import SimError

    lib = sim.load(build_library(SOURCE, arch="90"))
    with pytest.raises(SimError, match="no PTX for compute capability"):
        _launch(sim, lib)


def test_two_devices_in_one_process(sim, library):
    from .engine import SimEngine

    hopper = SimEngine((9, 0))
    other = hopper.load(build_library(SOURCE, arch="90"))
    assert _launch(hopper, other)[0] == 0
    assert other.attribute(75) == 9  # cudaDevAttrComputeCapabilityMajor
    assert _launch(sim, library)[0] == 0
    assert library.attribute(75) == 8


def test_library_without_a_shared_runtime_is_refused():
    with pytest.raises(ValueError, match="-cudart shared"):
        elf.rebind(b"\x7fELF\x02\x01" + b"\0" * 100)
