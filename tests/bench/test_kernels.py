"""The list of `bench/kernels.py` and its arithmetic; timings need a GPU."""

from __future__ import annotations

from bench import kernels
from sdgp_accel.backends import Needs


def test_bytes_by_hand() -> None:
    assert kernels.moved_bytes(100, 16, Needs(True, True, False)) == 100 * 16 * 4.25
    assert kernels.moved_bytes(100, 16, Needs(True, False, True)) == 100 * 16 * 3.125 + 64


def test_cases_are_distinct_and_on_the_lists() -> None:
    assert len(set(kernels.CASES)) == len(kernels.CASES)
    assert all(case.gradient in kernels.GRADIENTS and case.rule in kernels.RULES for case in kernels.CASES)
    assert all(t % positions == 0 for t, _, positions in kernels.GRADIENTS.values())
