"""Every kind of mistake the simulator claims to see, in a kernel that has it, next to the same kernel without."""

from __future__ import annotations

import pytest
import torch

from .toolchain import HERE, build_library

# kernel, its number in broken.cu, the fault of the broken twin
CASES = [
    ("shift_store", 0, "out-of-bounds"),
    ("reverse_block", 1, "shared-race"),
    ("reuse_tile", 2, "shared-race"),
    ("copy_async", 3, "async-race"),
    ("copy_stages", 4, "async-race"),
    ("vector_load", 5, "misaligned"),
    ("read_unwritten", 6, "uninitialised-read"),
    ("read_output", 7, "uninitialised-read"),
    ("shuffle_divergent", 8, "divergent-sync"),
    ("barrier_divergent", 9, "divergent-aligned"),
    ("barrier_lost", 10, "deadlock"),
    ("wild_shared", 11, "out-of-bounds"),
    ("warp_exchange", 12, "shared-race"),
    ("store_conflict", 13, "shared-race"),
    ("sparse_mma", 14, "illegal-metadata"),
    ("endless", 15, "no-progress"),
    ("overlapping_blocks", 16, "global-race"),
    ("read_neighbour", 17, "global-race"),
    ("last_block", 18, "global-race"),
    ("count_arrivals", 19, "global-race"),
    ("await_flag", 20, "global-race"),
    ("read_sum", 21, "shared-race"),
    ("clear_sum", 22, "shared-race"),
    ("shuffle_from_absent", 23, "divergent-sync"),
    ("barrier_crowded", 24, "deadlock"),
    ("load_matrix_divergent", 25, "divergent-aligned"),
    ("copy_too_much", 26, "out-of-bounds"),
]
N = 1024


@pytest.fixture(scope="module")
def broken(sim):
    return sim.load(build_library(HERE / "kernels" / "broken.cu"))


def _launch(sim, broken, number: int, mistake: bool) -> None:
    from .engine import pointer

    y, x = sim.empty(N), sim.put(torch.randn(N))  # a store beyond y must not reach x
    with sim.checked(), sim.following_global_memory():
        broken.run(number, pointer(x), pointer(y), N, mistake)


@pytest.mark.parametrize(("name", "number", "kind"), CASES, ids=[c[0] for c in CASES])
def test_correct_twin_runs(sim, broken, name, number, kind):
    _launch(sim, broken, number, False)


@pytest.mark.parametrize(("name", "number", "kind"), CASES, ids=[c[0] for c in CASES])
def test_mistake_is_reported_by_name(sim, broken, monkeypatch, name, number, kind):
    from . import scheduler
    from .faults import SimError

    monkeypatch.setattr(scheduler, "BLOCK_BUDGET", 20_000)
    with pytest.raises(SimError) as caught:
        _launch(sim, broken, number, True)
    fault = caught.value
    assert fault.kind == kind
    assert name in fault.kernel
    assert fault.line > 0
    assert "thread" in fault.thread
