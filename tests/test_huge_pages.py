"""Advice on memory: for whole pages inside the tensor, and only where there are any."""

from __future__ import annotations

import pytest
import torch

from sdgp_accel import huge_pages
from sdgp_accel.huge_pages import in_huge_pages

PAGE = 2 << 20


@pytest.mark.parametrize("pages", [0.25, 1.0, 2.0, 5.5])
def test_whole_pages_of_a_new_tensor_are_asked_for(pages: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *advice: asked.append(advice))
    fresh = torch.empty(int(pages * PAGE), dtype=torch.uint8)
    assert in_huge_pages(fresh) is fresh
    if pages >= 2.0:  # wherever it begins, one page at least lies inside
        ((start, size, advice),) = asked
        assert advice == 14  # MADV_HUGEPAGE
        assert start % PAGE == size % PAGE == 0
        assert fresh.data_ptr() <= start < fresh.data_ptr() + PAGE
        assert start + size <= fresh.data_ptr() + fresh.nbytes < start + size + PAGE
    assert all(size for _, size, _ in asked)


def test_what_is_no_memory_of_a_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_madvise", lambda: pytest.fail("asked"))
    in_huge_pages(torch.empty(4 * PAGE, device="meta"))
    in_huge_pages(torch.nn.Parameter(torch.empty(PAGE)))
