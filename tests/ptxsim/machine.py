"""Runs kernel launches: wave after wave of CTAs, each compiled once per kernel and launch shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .program import Program, decode
from .ptx import Kernel, Module
from .scheduler import Scheduler
from .wave import Counters, Device, Dim3, Wave

WAVE_THREADS = 2048
WAVE_HISTORY_BYTES = 1 << 26  # what the race detector keeps
CACHED_WAVES = 4  # some 100 MB each at most


# Which blocks of a launch to run, given the kernel's name and the grid; blocks as (x, y, z).
Choice = Callable[[str, Dim3], Iterable[Dim3]]

_waves: dict[tuple[int, Dim3, int, int, Dim3], Wave] = {}


class Launcher:
    """Launches on one device; keeps decoded programs, and the latest compiled waves of all launchers."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.programs: dict[int, Program] = {}

    def launch(
        self,
        module: Module,
        kernel: Kernel,
        grid: Dim3,
        block: Dim3,
        dynamic_shared: int,
        params: bytes,
        cluster: Dim3 = (1, 1, 1),
        choice: Choice | None = None,
        overlaps: bool = False,
    ) -> Counters:
        """Runs the whole grid, or the clusters that hold a block of `choice`.

        overlaps: with the kernel before it (programmatic dependent launch). Launches run one after another here all the
        same; every block has to wait for that one before it ends, since what follows waits for this one only.
        """
        program = self.programs.get(id(kernel))
        if program is None:
            program = self.programs[id(kernel)] = decode(kernel, module.variables)
        threads = -(-block[0] * block[1] * block[2] // 32) * 32
        total = grid[0] * grid[1] * grid[2]
        size = cluster[0] * cluster[1] * cluster[2]
        numbers = np.arange(total) if choice is None else _ctas(choice(kernel.name, grid), grid, cluster)
        if not numbers.size:
            return Counters()
        shared = dynamic_shared + program.shared_static + 1024
        history = shared // program.granule * size * (threads // 32 + 4) * 8
        ctas = max(1, min(numbers.size, WAVE_THREADS // threads, WAVE_HISTORY_BYTES // history) // size) * size
        key = (id(kernel), block, ctas, dynamic_shared, cluster)
        wave = _waves.pop(key, None)
        if wave is None:
            wave = Wave(self.device, program, block, ctas, dynamic_shared, cluster)
        _waves[key] = wave  # the latest last
        if len(_waves) > CACHED_WAVES:
            del _waves[next(iter(_waves))]
        wave.counters = Counters()
        self.device.memory.races.begin(total // size, overlaps=overlaps)
        with np.errstate(all="ignore"):
            for first in range(0, numbers.size, ctas):
                wave.start(numbers[first : first + ctas], grid, params)
                Scheduler(wave).run()
                wave.check_end(numbers.size - first, overlaps=overlaps)
        return wave.counters


def _ctas(blocks: Iterable[Dim3], grid: Dim3, cluster: Dim3) -> NDArray[np.int64]:
    """Numbers of the CTAs of the blocks' clusters, in order; CTAs are numbered cluster by cluster."""
    clusters = set()
    for block in blocks:
        if any(not 0 <= i < extent for i, extent in zip(block, grid, strict=True)):
            raise ValueError(f"blocks must lie in the grid {grid}; got {block}")
        x, y, z = (i // size for i, size in zip(block, cluster, strict=True))
        clusters.add(x + grid[0] // cluster[0] * (y + grid[1] // cluster[1] * z))
    size = cluster[0] * cluster[1] * cluster[2]
    return (np.array(sorted(clusters), np.int64)[:, None] * size + np.arange(size)).reshape(-1)
