"""Where a number comes from: machine, clocks, versions, revision. Goes into every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sdgp_accel

_LIBRARIES = ("torch", "torchvision", "timm", "triton", "numpy", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13")
# nvidia-smi's names of what tells whether a GPU ran at full speed.
_GPU_STATE = (
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_event_reasons.active",
)


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything about this process and machine that a timing on `device` depends on, as JSON-ready values."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sdgp_accel": sdgp_accel.__version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "settings": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
    }


def gpu_state(device: torch.device) -> dict[str, str]:
    """nvidia-smi's view of `device` now: clocks, power, temperature, driver. Empty where nvidia-smi is missing."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in line.split(",")]
    return dict(zip(_GPU_STATE, values, strict=False))


def git_revision() -> str | None:
    """Commit of the checkout that this package runs from, with ``+changes`` where it differs; None outside of one.

    A copy without its history is told by the environment variable SDGP_GIT_REVISION.
    """
    folder = Path(sdgp_accel.__file__).parent
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        tracked = _git(folder, "ls-files", "__init__.py")
        # A benchmark overwrites the results of the last time: the next one's code is the same.
        code = (":(top)", ":(top,exclude)bench/results")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *code)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SDGP_GIT_REVISION")
    if not tracked:  # an installed copy inside somebody else's repository
        return os.environ.get("SDGP_GIT_REVISION")
    return revision + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        version: str = importlib.metadata.distribution(distribution).version
    except importlib.metadata.PackageNotFoundError:
        return None
    return version


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "state": gpu_state(device),
    }
