"""The Triton kernel of the convergence runs prunes as the package does; in Triton's interpreter, so without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import itertools, torch
from bench.learning import triton_pruning
from sdgp_accel import pruning
from sdgp_accel.config import FUNCTIONS, SCOPES, PruneSpec
from sdgp_accel.philox import Rng, draw

samples, positions, channels = 4, 33, 42  # partial groups along both axes
for function, (n, m), axis in itertools.product(FUNCTIONS, [(2, 4), (1, 8), (16, 32)], [0, 1]):
    x = torch.randn(samples * positions, channels)
    x[torch.rand_like(x) < 0.5] = 0
    rng = Rng(draw("cpu"), rank=3, pass_index=axis)
    for scope in SCOPES if function == "rescale_magnitude" else ["group"]:
        spec = PruneSpec(function, n, m, scope)
        expected = pruning.prune_matrix(x, spec, axis, positions, rng)
        actual = triton_pruning.prune_matrix(x, spec, axis, positions, rng)
        # One group in thousands may round to the other side of its random number.
        agreeing = torch.isclose(actual, expected, rtol=1e-4).float().mean().item()
        assert agreeing > 0.999, (spec, axis, agreeing)
        transposed = triton_pruning.prune_matrix(x.t().contiguous().t(), spec, axis, positions, rng)
        assert torch.allclose(actual, transposed), (spec, axis)
"""


def test_kernel_agrees_with_the_package():
    # The interpreter has to be asked for before triton is first imported: hence a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
