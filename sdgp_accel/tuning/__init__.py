"""``backend="auto"`` on a GPU: which passes of a layer gain from the sparse kernels is measured, not guessed.

The first time a layer shape is used, the parts of its backward are timed, dense and sparse in turns, and the fastest
combination runs from then on. Pruning and compressing is charged where it falls: once for both passes, less where
only one is pruned. What does not gain runs the ordinary dense backward. The outcome is remembered on disk (`cache`)
and is the same for all data-parallel ranks (`agreement`). Under ``torch.use_deterministic_algorithms(True)`` nothing
is timed or remembered: the choice is predicted (`prediction`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

import sdgp_accel
from sdgp_accel.backends import Backend, Tilings, gpu, warn_once
from sdgp_accel.config import Pass
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.layer_plan import LayerPlan, encode
from sdgp_accel.tuning import cache
from sdgp_accel.tuning.agreement import agreed
from sdgp_accel.tuning.choice import choose, choose_single
from sdgp_accel.tuning.measurement import Measurement, measure
from sdgp_accel.tuning.prediction import predict
from sdgp_accel.tuning.record import BackwardTimes, Tuned

__all__ = ["BackwardTimes", "Measurement", "Tuned", "choose", "measure", "tune_shape"]

# Of one layer, as many sizes of its input are timed. With sequences of every length each step may bring a new one, and
# timing takes longer than it could save: sizes beyond these run as the nearest one does.
TIMED_SIZES = 32

# What this process has found out, by layer and settings, then by size.
_timed: dict[Hashable, dict[Geometry, Tuned]] = {}


class _Layer(NamedTuple):
    """What is tuned: the backward of one layer on an input of one size, by the kernels of `backend`."""

    backend: Backend
    plan: LayerPlan
    geometry: Geometry
    dtype: torch.dtype
    device: torch.device


def tune_shape(
    backend: Backend,
    plan: LayerPlan,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool,
) -> Tuned:
    """The passes of `plan` that gain on this device and how to launch them, measured unless it is known already.

    deterministic: predict it instead. A layer that cannot be timed (a CUDA graph is being captured, memory is short)
    runs dense, and the reason says so.
    """
    if deterministic:
        return predict(plan, geometry, device)
    settings = _settings(geometry)
    timed = _timed.setdefault((backend, plan, _without_size(geometry), dtype, device, settings), {})
    if geometry in timed:
        return timed[geometry]
    key = f"{encode(plan)} {geometry!r} {dtype} {settings}"

    def propose() -> str:
        layer = _Layer(backend, plan, geometry, dtype, device)
        return json.dumps(_tune_here(layer, key, timed).to_dict())

    tuned = Tuned.from_dict(json.loads(agreed(key, propose)))
    if tuned.times is not None:
        timed[geometry] = tuned
    return tuned


def forget() -> None:
    """What this process has found out, but not what is on disk."""
    _timed.clear()


def _settings(geometry: Geometry) -> str:
    """The switches of torch that make the dense products of a layer faster or slower."""
    if isinstance(geometry, Conv2dGeometry):
        cudnn = torch.backends.cudnn
        return f"cudnn: enabled={cudnn.enabled} benchmark={cudnn.benchmark} deterministic={cudnn.deterministic}"
    matmul = torch.backends.cuda.matmul
    names = (
        "allow_fp16_accumulation",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    )
    found = [f"{name}={getattr(matmul, name, None)}" for name in names]  # the first one not before torch 2.7
    return f"{torch.backends.cuda.preferred_blas_library()}: {' '.join(found)}"


def _without_size(geometry: Geometry) -> Geometry:
    """The same for all inputs of one layer."""
    if isinstance(geometry, LinearGeometry):
        return geometry._replace(tokens=0, positions_per_sample=0)
    return geometry._replace(batch=0, height=0, width=0, out_height=0, out_width=0)


def _as_the_nearest(timed: Mapping[Geometry, Tuned], geometry: Geometry) -> Tuned:
    nearest = min(timed, key=lambda other: abs(math.log(other.positions / geometry.positions)))
    reason = (
        f"as with {nearest.positions} positions, of {len(timed)} sizes that have been timed: {timed[nearest].reason}"
    )
    return timed[nearest]._replace(reason=reason, times=None)


def find_tilings(
    tuned: Tuned, backend: Backend, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> Tilings | None:
    """The backend's tilings that `tuned` names; None where it does not have them."""
    names: tuple[Pass, Pass] = ("grad_input", "grad_weight")
    found = []
    for pass_name, text in zip(names, tuned.tilings, strict=True):
        listed = {str(tiling): tiling for tiling in backend.tilings(geometry, pass_name, dtype, device)}
        if text is not None and text not in listed:
            return None
        found.append(None if text is None else listed[text])
    return Tilings(*found)


def _tune_here(layer: _Layer, key: str, timed: Mapping[Geometry, Tuned]) -> Tuned:
    """What this machine remembers of the layer, or else measures now, or takes from other sizes that are `timed`."""
    device = layer.device
    known = _remembered(layer.backend, device)
    tuned = known.get(key) if known is not None else None
    if tuned is not None and find_tilings(tuned, layer.backend, layer.geometry, layer.dtype, device) is not None:
        return tuned._replace(reason=f"{tuned.reason} (remembered)")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        reason = "first used while a CUDA graph was captured, where nothing can be timed: run one step before"
        return Tuned((False, False), reason)
    if len(timed) >= TIMED_SIZES:
        return _as_the_nearest(timed, layer.geometry)
    # Clock and kernels work on the current device, which need not be the layer's where a model is spread over several.
    # Modes are the user's, for the layer itself: selective checkpointing would keep the products that are timed, and
    # give them to the layers that ask for theirs in backward.
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with on_device, torch.no_grad(), torch.autocast(device.type, enabled=False), _disable_current_modes():
            measured = measure(*layer)
    except torch.OutOfMemoryError:
        return Tuned((False, False), "too little free memory to time the sparse kernels on this shape")
    tuned = _conclude(measured)
    if not measured.steady:
        warn_once(
            f"times on {device} differ a lot from round to round, as on a GPU that other processes use: what follows "
            "from them is used now, but not remembered"
        )
    elif known is not None:
        known.add(key, tuned)
    return tuned


def _conclude(measured: Measurement) -> Tuned:
    prunes, times = choose(measured), measured.device
    totals = times.totals()
    if any(prunes):
        reason = f"measured: backward {totals[prunes]:.3f} ms, dense {times.dense:.3f} ms"
    else:
        best = min(total for passes, total in totals.items() if any(passes))
        reason = f"dense is faster here: {times.dense:.3f} ms, sparse {best:.3f} ms"
        if best < times.dense:
            reason += " on the GPU, but the host takes longer to launch it"
    single = choose_single(measured)
    tilings = tuple(
        str(tiling) if tiling is not None and any(pruned) else None
        for tiling, *pruned in zip(measured.tilings, prunes, single, strict=True)
    )
    return Tuned(prunes, reason, (tilings[0], tilings[1]), times, single)


def _remembered(backend: Backend, device: torch.device) -> cache.TuningCache | None:
    """The file for `device`, read once; None where nothing is remembered."""
    try:
        folder = cache.folder()
    except RuntimeError as error:
        warn_once(f"measured choices are not remembered: {error}; name a folder with {cache.VARIABLE}")
        return None
    return None if folder is None else _open(folder, backend, device)


@functools.cache
def _open(folder: Path, backend: Backend, device: torch.device) -> cache.TuningCache:
    return cache.TuningCache(folder, environment(backend, device))


def environment(backend: Backend, device: torch.device) -> dict[str, str]:
    """What the times of every layer depend on."""
    values = {
        "sdgp_accel": sdgp_accel.__version__,
        "kernels": backend.fingerprint(),
        "torch": str(torch.__version__),
        "device": device.type,
    }
    if device.type == "cuda":
        multiprocessors = gpu.device_facts(device).multiprocessors
        values["device"] = f"{torch.cuda.get_device_name(device)}, {multiprocessors} multiprocessors"
        values["driver"] = _driver()
        values["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return values


def _driver() -> str:
    """The release of the NVIDIA driver where the kernel module tells it, as on Linux."""
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+[.\d]*", version.read_text()) if version.exists() else None
    return "unknown" if found is None else found.group()
