"""The metadata layouts against CUTLASS's own host code, compiled from the nvidia-cutlass wheel."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgp_accel.config import SDGPConfig
from sdgp_accel.layouts import LAYOUTS, PADDING_WORD, TiledLayout
from sdgp_accel.semi_structured import compress
from tests.ptxsim import toolchain

SHAPES = [(32, 2), (64, 8), (128, 16), (192, 24), (1, 1), (5, 3), (33, 9), (100, 7), (257, 17)]
Filter = Callable[..., torch.Tensor]


@pytest.fixture(scope="session")
def cutlass_host(tmp_path_factory: pytest.TempPathFactory) -> Filter:
    """Runs cutlass_host.cu (which see): (what, M, W, *int16 tensors) -> int16, one-dimensional."""
    home, includes = toolchain.cuda_home(), toolchain.cutlass_include()
    if home is None or not includes:
        pytest.skip(toolchain.missing() or "no CUTLASS headers: pip install nvidia-cutlass==4.2.0.0")
    program = tmp_path_factory.mktemp("cutlass") / "cutlass_host"
    command = [home / "bin" / "nvcc", "-std=c++17", "-w", "-arch=sm_90", "--expt-relaxed-constexpr", "-o", program]
    command += [f"-I{path}" for path in includes] + [f"-L{home / lib}" for lib in ("lib64", "lib")]
    build = subprocess.run([*command, Path(__file__).parent / "cutlass_host.cu"], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr

    def run(what: str, rows: int, words: int, *tensors: torch.Tensor) -> torch.Tensor:
        data = b"".join(t.contiguous().numpy().tobytes() for t in tensors)
        result = subprocess.run([program, what, str(rows), str(words)], input=data, capture_output=True, check=True)
        return torch.from_numpy(np.frombuffer(result.stdout, np.int16).copy())

    return run


def random_words(rows: int, words: int) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, (rows, words), dtype=torch.int16)


def pad(words: torch.Tensor, layout: TiledLayout) -> torch.Tensor:
    rows, columns = -words.shape[0] % layout.tile_rows, -words.shape[1] % layout.tile_words
    return torch.nn.functional.pad(words, (0, columns, 0, rows), value=PADDING_WORD)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_encode_and_decode_agree_with_cutlass(name: str, shape: tuple[int, int], cutlass_host: Filter) -> None:
    layout, words = LAYOUTS[name], random_words(*shape)
    padded = pad(words, layout)
    theirs = cutlass_host(name, *padded.shape, padded)
    assert torch.equal(layout.encode(words), theirs)
    assert torch.equal(layout.decode(theirs, *shape), words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 32), (37, 72), (5, 7), (64, 640)])
@pytest.mark.parametrize("axis", [0, 1])
def test_cutlass_uncompresses_our_operand(
    axis: int, shape: tuple[int, int], dtype: torch.dtype, cutlass_host: Filter
) -> None:
    operand = compress(torch.randn(shape).to(dtype), SDGPConfig(), axis, seed=0)
    values, words = (t if axis == 1 else t.t() for t in (operand.values.view(torch.int16), operand.metadata))
    dense = cutlass_host("uncompress", *words.shape, words, values).view(words.shape[0], 16 * words.shape[1])
    ours = operand.decompress().view(torch.int16)
    ours = ours if axis == 1 else ours.t()
    assert torch.equal(dense[:, : ours.shape[1]], ours)
    assert not dense[:, ours.shape[1] :].any()


@pytest.mark.parametrize("shape", [*SHAPES, (0, 4), (4, 0)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_decode_inverts_encode(name: str, shape: tuple[int, int]) -> None:
    words = random_words(*shape)
    memory = LAYOUTS[name].encode(words)
    assert memory.is_contiguous()
    assert torch.equal(LAYOUTS[name].decode(memory, *shape), words)


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_is_legal(name: str) -> None:
    memory = LAYOUTS[name].encode(torch.zeros(1, 1, dtype=torch.int16))
    assert (memory == PADDING_WORD).sum() == memory.numel() - 1


def test_bad_arguments() -> None:
    layout = LAYOUTS["sm80"]
    with pytest.raises(ValueError, match=r"int16 of 2 dimensions; got torch.int32"):
        layout.encode(torch.zeros(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"int16 of 2 dimensions; got torch.int16 of shape \(4,\)"):
        layout.encode(torch.zeros(4, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"must hold 128 int16 words .*; got 64"):
        layout.decode(torch.zeros(64, dtype=torch.int16), 33, 2)
    with pytest.raises(ValueError, match=r"got 128 of torch.int32"):
        layout.decode(torch.zeros(128, dtype=torch.int32), 33, 2)
