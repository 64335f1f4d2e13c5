"""The engine of the kernel tests, named in every test's id."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import engines


@pytest.fixture(scope="session", params=["gpu" if torch.cuda.is_available() else "sim"])
def engine(request):
    reason = engines.missing()
    if reason:
        pytest.skip(reason)
    if request.param == "gpu":
        return engines.GpuEngine()
    from tests.ptxsim.engine import SimEngine

    return SimEngine()


@pytest.fixture(scope="session")
def hopper(engine):
    """The engine as an sm_90a device."""
    if engine.name == "gpu":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("not an sm_90 GPU")
        return engine
    from tests.ptxsim.engine import SimEngine

    return SimEngine((9, 0))


@pytest.fixture(scope="session")
def extension(engine):
    """`cutlass_ops._C`, bound to the engine."""
    if engine.name == "gpu":
        return engine.extension()
    return engine.load_module(engines.build_simulated_extension(), "cutlass_ops._C")
