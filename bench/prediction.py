"""What a roofline says of the rows of bench/layers.py, to stand beside what was measured."""

from __future__ import annotations

from typing import Any

from sdgp_accel.config import PruneSpec
from sdgp_accel.geometry import Conv2dGeometry, Geometry, LinearGeometry
from sdgp_accel.roofline import GPU, GPUS, Work, compress_seconds, dense_seconds, known_gpu, sparse_seconds
from sdgp_accel.tuning import BackwardTimes


def geometry_of(values: dict[str, Any]) -> Geometry:
    """A layer's geometry from its JSON."""
    if "tokens" in values:
        return LinearGeometry(**values)
    return Conv2dGeometry(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def gpu_of(origin: dict[str, Any]) -> GPU | None:
    """The roofline of the GPU in a file's provenance; None where it is not a known one."""
    name = known_gpu((origin.get("gpu") or {}).get("name", ""))
    return GPUS[name] if name is not None else None


def predict(row: dict[str, Any], gpu: GPU) -> BackwardTimes:
    """Milliseconds of the parts of one layer's backward, for a row of bench/layers.py."""
    work = Work.of(geometry_of(row["geometry"]))
    cost = gpu.compress_cost(PruneSpec(row["prune"], 2, 4))
    dense, sparse = 1e3 * dense_seconds(work, gpu), 1e3 * sparse_seconds(work, gpu)
    passes = (work.passes, work.passes[:1], work.passes[1:])
    compress = [1e3 * compress_seconds(work, gpu, chosen, "two_pass", cost) for chosen in passes]
    return BackwardTimes(dense, dense, sparse, sparse, *compress)
