"""What the benchmarks of the kernels have in common: the GPU and the kernels on it, and where results go."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from sdgp_accel.backends import KERNELS, Backend, load

RESULTS = Path(__file__).parent / "results"


def find_kernels(without_gpu: str = "") -> tuple[Backend, torch.device]:
    """The kernels, and the current GPU, which they run on. ClickException where there are none.

    without_gpu: what to say besides where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise click.ClickException(f"no CUDA device: there is nothing to measure here{without_gpu}")
    device = torch.device("cuda", torch.cuda.current_device())
    backend = load(KERNELS)
    problem = "not installed" if backend is None else backend.unavailable(device)
    if backend is None or problem is not None:
        raise click.ClickException(f"the {KERNELS} kernels: {problem}")
    return backend, device


def result_path(benchmark: str) -> Path:
    """Where the results of `benchmark` on this GPU go by default."""
    return RESULTS / f"{benchmark}-{torch.cuda.get_device_name().replace(' ', '_')}.json"
