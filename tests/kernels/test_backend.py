"""The cutlass backend: its decisions everywhere, its gradients on a GPU against the reference backend's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cutlass_ops
from cutlass_ops import build_kernels
from sdgp_accel import SDGPConfig, backends
from sdgp_accel.backends import Call, Decision, Tilings, cutlass, dense, gpu, tiles
from sdgp_accel.backends import products as sparse_products
from sdgp_accel.backends.bound import SparseBackward
from sdgp_accel.backends.tiles import Tiling, workspace_bytes
from sdgp_accel.geometry import Conv2dGeometry, LinearGeometry
from sdgp_accel.layer_plan import decode, plan_string
from sdgp_accel.nn import SDGPConv2d, SDGPLinear
from sdgp_accel.semi_structured import compress_matrix
from tests.kernels import products, test_sm80_sparse, test_sm90_sparse
from tests.kernels.products import SimulatedKernels, SimulatorEngine
from tests.ptxsim import toolchain

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

CUDA = torch.device("cuda", 0)
HAS_KERNELS = torch.cuda.is_available() and bool(cutlass_ops.ARCHS)
needs_gpu = pytest.mark.skipif(not HAS_KERNELS, reason="no GPU with the kernels built")


@pytest.fixture
def hopper(monkeypatch):
    """A GPU to decide for."""
    monkeypatch.setattr(gpu, "device_facts", lambda device: gpu.Device((9, 0), 132, wgmma=True))
    monkeypatch.setattr(gpu, "launch_problem", lambda device: "")
    monkeypatch.setattr(cutlass_ops, "ARCHS", ("80", "90a"))


@pytest.mark.parametrize(
    ("arch", "capability", "expected"),
    [("80", (8, 0), True), ("80", (8, 9), True), ("86", (8, 0), False), ("80", (9, 0), False), ("90a", (9, 0), True),
     ("90a", (10, 0), False), ("90", (9, 0), True), ("compute_80", (12, 0), True), ("compute_90", (8, 9), False),
     ("100f", (10, 0), True), ("100f", (10, 3), True), ("compute_100f", (12, 0), False),
     ("compute_90a", (10, 0), False), ("80", (8, 7), False), ("86", (8, 7), False),
     ("87", (8, 7), True), ("87", (8, 9), False), ("compute_80", (8, 7), True), ("120", (12, 1), True)],
)  # fmt: skip
def test_which_code_runs_where(arch, capability, expected):
    assert gpu.runs_on(arch, capability) is expected


def test_unavailable_names_the_command(hopper, monkeypatch):
    assert cutlass.BACKEND.unavailable(CUDA) is None
    monkeypatch.setattr(gpu, "launch_problem", lambda device: "too old a driver")
    assert "do not run here: too old a driver; update the NVIDIA driver" in cutlass.BACKEND.unavailable(CUDA)
    monkeypatch.setattr(cutlass_ops, "ARCHS", ("86",))
    assert "SDGP_CUDA_ARCHS=90a SDGP_CUDA=1 pip install" in cutlass.BACKEND.unavailable(CUDA)
    monkeypatch.setattr(gpu, "sparse_gpus", lambda: {(8, 6): 0, (9, 0): 1})
    assert "SDGP_CUDA_ARCHS='86;90a' SDGP_CUDA=1 pip install" in cutlass.BACKEND.unavailable(CUDA)
    monkeypatch.setattr(cutlass_ops, "ARCHS", ())
    assert "not built" in cutlass.BACKEND.unavailable(CUDA)
    monkeypatch.setattr(cutlass_ops, "load_error", lambda: "libcudart.so.12: cannot open shared object file")
    assert "run: pip install 'nvidia-cuda-runtime-cu12==12.*'" in cutlass.BACKEND.unavailable(CUDA)


@pytest.mark.parametrize(
    ("change", "part"),
    [({}, None), ({"dtype": torch.float32}, "float32"), ({"n": 4, "m": 8}, "4:8"), ({"n": 1, "m": 2}, "1:2"),
     ({"groups": 2}, "groups = 2"), ({"channels": 20}, None), ({"padding": 121}, None),
     ({"channels": 1 << 31}, "2147483648"), ({"channels": 1 << 31, "backend": "cutlass"}, None)],
)  # fmt: skip
def test_unsupported_says_why(hopper, change, part):
    options = {"dtype": torch.float16, "n": 2, "m": 4, "groups": 1, "channels": 64, "backend": "auto"} | change
    stride, padding, dilation = (
        change.get(name, default) for name, default in (("stride", 1), ("padding", 64), ("dilation", 1))
    )
    window = (stride, 1, padding, 1, dilation, 1, options["groups"])
    weight_shape = (options["channels"], 32 // options["groups"], 3, 3)
    geometry = Conv2dGeometry.of((2, 32, 8, 8), weight_shape, window, True)
    config = SDGPConfig(n=options["n"], m=options["m"], backend=options["backend"])
    reason = cutlass.BACKEND.unsupported(geometry, decode(plan_string("conv2d", config)), options["dtype"], CUDA)
    assert reason is None if part is None else part in reason


def test_empty_gradients_are_left_to_others(hopper):
    plan = decode(plan_string("linear", SDGPConfig(backend="cutlass")))
    assert "empty" in cutlass.BACKEND.unsupported(LinearGeometry(0, 8, 8), plan, torch.float16, CUDA)


@pytest.mark.parametrize("geometry", [LinearGeometry(0, 8, 8), LinearGeometry(8, 8, 0)])
def test_empty_gradients_are_no_error(hopper, monkeypatch, geometry):
    """An expert without tokens: there is nothing that the kernels would have to take."""
    monkeypatch.setattr(backends, "_no_sparse_tensor_cores", lambda device: None)
    plan = plan_string("linear", SDGPConfig(fallback="error"))
    assert backends.decide(plan, geometry, torch.float16, CUDA).backend is None


@pytest.mark.parametrize("pass_name", ["grad_input", "grad_weight"])
@pytest.mark.parametrize(
    "geometry",
    [
        LinearGeometry(25088, 1024, 4096),
        Conv2dGeometry.of((8, 64, 14, 14), (128, 64, 3, 3), (2, 2, 1, 1, 1, 1, 1), True),
    ],
    ids=["linear", "conv2d"],
)
def test_candidates_are_different_tiles_best_first(hopper, geometry, pass_name):
    listed = cutlass.BACKEND.tilings(geometry, pass_name, torch.float16, CUDA)
    product = "wgrad" if pass_name == "grad_weight" else "dgrad"
    conv = isinstance(geometry, Conv2dGeometry)
    family = tiles.SM90
    table = {
        ("dgrad", False): family.dgrad, ("dgrad", True): family.conv_dgrad,
        ("wgrad", False): family.wgrad, ("wgrad", True): family.conv_wgrad,
    }[product, conv]  # fmt: skip
    assert {(tiling.tile, tiling.cluster_size) for tiling in listed} == {(str(tile), tile.cluster) for tile in table}
    assert len(set(map(str, listed))) == len(listed)
    m, n, k = {
        ("linear", "grad_input"): (25088, 1024, 4096), ("linear", "grad_weight"): (4096, 1024, 25088),
        ("conv2d", "grad_input"): (8 * 14 * 14, 64, 128 * 3), ("conv2d", "grad_weight"): (128, 64 * 9, 8 * 7 * 7),
    }["linear" if isinstance(geometry, LinearGeometry) else "conv2d", pass_name]  # fmt: skip
    shares = not (conv and product == "dgrad")  # strided
    assert listed == tiles.rank_tilings(tiles.SM90, product, m, n, k, 132, conv, shares)


LARGE = LinearGeometry(1 << 31, 64, 64)


@pytest.mark.parametrize("family", [tiles.SM90, tiles.SM80, tiles.SM80_SMALL, tiles.SM80_ANY], ids=lambda f: f.name)
def test_every_candidate_has_been_written(family):
    sources = {path.stem for path in build_kernels.INSTANCES.glob("*.cu")}
    listed = {
        f"{tiling.family}_{'conv_' if is_conv else ''}{product}_{dtype}_{tiling.tile}"
        for is_conv in (False, True) for product in ("dgrad", "wgrad") for dtype in ("f16", "bf16")
        for tiling in tiles.rank_tilings(family, product, 512, 512, 512, 132, is_conv)
    }  # fmt: skip
    assert listed <= sources


def test_there_is_nothing_to_list_without_sparse_products(hopper):
    assert cutlass.BACKEND.tilings(LARGE, "grad_input", torch.float16, CUDA) == ()


def test_columns_count_with_the_padding_of_the_channels():
    """Which is to whole tiles of 64 in Hopper's wgrad: 40 channels of 6000 x 6000 taps would fit."""
    geometry = Conv2dGeometry.of((1, 40, 6000, 6000), (8, 40, 6000, 6000), (1, 1, 0, 0, 1, 1, 1), True)
    assert str(64 * 6000**2) in sparse_products.too_large(geometry)


def test_pixels_that_a_stride_skips_count():
    geometry = Conv2dGeometry.of((1 << 11, 8, 1024, 1024), (8, 8, 1, 1), (2, 2, 0, 0, 1, 1, 1), True)
    assert str(1 << 31) in sparse_products.too_large(geometry)
    assert sparse_products.too_large(geometry._replace(batch=1 << 10)) is None


def test_strides_that_no_grid_holds_have_no_sparse_products():
    shapes = (1, 8, 600, 600), (8, 8, 1, 1)
    fits = Conv2dGeometry.of(*shapes, (255, 257, 0, 0, 1, 1, 1), True)
    assert sparse_products.too_large(fits) is None
    assert "65792" in sparse_products.too_large(fits._replace(stride=(256, 257)))


@pytest.mark.parametrize(
    ("geometry", "families"),
    [
        (LinearGeometry(50, 64, 40), ("sm90", "sm90")),
        (LinearGeometry(50, 64, 21), ("sm90", "sm90")),
        (LinearGeometry(50, 36, 40), ("sm80_any", "sm80_any")),
        (Conv2dGeometry.of((2, 32, 8, 8), (64, 32, 3, 3), (1, 1, 121, 1, 1, 1, 1), True), ("sm80", "sm80")),
        (Conv2dGeometry.of((2, 32, 8, 8), (64, 32, 3, 3), (1, 1, 64, 64, 61, 1, 1), True), ("sm80", "sm80")),
        (Conv2dGeometry.of((2, 32, 8, 8), (64, 32, 3, 3), (9, 1, 1, 1, 1, 1, 1), True), ("sm80", "sm80")),
        (Conv2dGeometry.of((2, 32, 8, 8), (64, 32, 3, 3), (2, 2, 1, 1, 1, 1, 1), True), ("sm90", "sm90")),
    ],
)
def test_what_hopper_cannot_take_runs_on_the_other_kernels(hopper, geometry, families):
    for pass_name, family in zip(("grad_input", "grad_weight"), families, strict=True):
        tiling = cutlass.BACKEND.tilings(geometry, pass_name, torch.float16, CUDA)[0]
        assert tiling.family + ("_any" if tiling.tile.endswith("_any") else "") == family


@pytest.mark.parametrize(
    ("capability", "kilobytes", "largest"),
    [((8, 0), 163, 256), ((8, 0), None, 256), ((8, 9), None, 128), ((9, 0), None, 256), ((12, 0), None, 128),
     ((12, 1), 99, 128), ((13, 1), 99, 128), ((13, 0), 227, 256)],
)  # fmt: skip
def test_tiles_fit_the_shared_memory(monkeypatch, capability, kilobytes, largest):
    """Of GPUs that came later as well, where torch tells how much they have."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=100)
    if kilobytes is not None:
        properties.shared_memory_per_block_optin = kilobytes << 10
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu, "hardware", gpu.hardware.__wrapped__)
    monkeypatch.setattr(cutlass_ops, "ARCHS", ("80", "compute_80"))
    tilings = cutlass.BACKEND.tilings(LinearGeometry(50000, 1024, 1024), "grad_input", torch.float16, CUDA)
    assert max(int(tiling.tile.split("x")[0]) for tiling in tilings) == largest


@pytest.mark.parametrize(("carveout", "left"), [(None, 132), (0, 132), (16, 116), (500, 1)])
def test_products_leave_the_multiprocessors_that_torch_is_told_to_leave(monkeypatch, carveout, left):
    monkeypatch.setattr(gpu, "hardware", lambda device: gpu.Device((9, 0), 132, wgmma=True))
    monkeypatch.setattr(gpu, "_carveout", lambda: carveout)
    assert gpu.device_facts(CUDA) == gpu.Device((9, 0), left, wgmma=True)
    launches = []
    kernels = SimpleNamespace(SparseGemm=lambda name, sm_count, **others: launches.append(sm_count))
    plan = sparse_products.plan_product.__wrapped__
    plan(kernels, LinearGeometry(512, 256, 256), "dgrad", torch.float16, CUDA, None, torch.float16)
    assert launches == [left]


def test_torch_tells_how_many_multiprocessors_to_leave():
    if not hasattr(torch._C, "_set_sm_carveout_experimental"):
        pytest.skip("not before torch 2.7")
    try:
        torch._C._set_sm_carveout_experimental(5)
        assert gpu._carveout() == 5
    finally:
        torch._C._set_sm_carveout_experimental(None)


@pytest.fixture(params=["90a", "80"])
def product_device(request, monkeypatch):
    """Where a family's sparse products run: a GPU that has them, else the CPU, which the simulator stands behind."""
    arch = request.param
    if (test_sm90_sparse if arch == "90a" else test_sm80_sparse).ON_GPU:
        if arch == "80":
            monkeypatch.setattr(sparse_products, "_tma_can_reach", lambda geometry: False)
        return CUDA
    if reason := toolchain.missing():
        pytest.skip(reason)
    simulated = SimulatedKernels(SimulatorEngine(arch))
    facts = gpu.Device((int(arch[0]), int(arch[1])), SimulatorEngine.sm_count, wgmma=arch == "90a")
    monkeypatch.setattr(gpu, "device_facts", lambda device: facts)
    monkeypatch.setattr(gpu, "current_device", lambda: None)  # the index of the CPU
    monkeypatch.setattr(gpu, "stream_of", lambda device: 0)
    monkeypatch.setattr(cutlass_ops, "ARCHS", (arch,))
    monkeypatch.setattr(cutlass_ops, "kernels", lambda: simulated)
    return torch.device("cpu")


WGRAD_GEOMETRIES = {
    "linear": LinearGeometry(300, 24, 16),
    "pointwise": Conv2dGeometry.of((2, 24, 11, 12), (16, 24, 1, 1), (1, 1, 0, 0, 1, 1, 1), False),
    "3x3": Conv2dGeometry.of((2, 24, 11, 12), (16, 24, 3, 3), (1, 1, 1, 1, 1, 1, 1), True),
    "3x3_contiguous": Conv2dGeometry.of((2, 24, 11, 12), (16, 24, 3, 3), (1, 1, 1, 1, 1, 1, 1), False),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in WGRAD_GEOMETRIES for dtype in (None, torch.bfloat16, torch.float32)
     # What torch adds to a layout that the kernels do not have has been rounded before.
     if (name, dtype) != ("3x3_contiguous", torch.bfloat16)],
)  # fmt: skip
def test_wgrad_delivers_to_out(product_device, name, dtype):
    geometry = WGRAD_GEOMETRIES[name]
    shape = (geometry.positions, 24) if name == "linear" else geometry.input_shape
    memory_format = torch.channels_last if getattr(geometry, "channels_last", False) else torch.contiguous_format
    dy = products.sparse_matrix(geometry.positions, 16, 0, torch.bfloat16).to(product_device)
    x = torch.randn(shape, device=product_device).bfloat16().contiguous(memory_format=memory_format)
    operand = products.stored(compress_matrix(dy, 0))
    # Instances that other tests of the simulator compile anyway.
    wanted = {"sm90": "128x256" if name.startswith("3x3") else "256x128", "sm80": "64x128"}
    tiling = next(
        tiling._replace(cluster_size=1, splits=2, owned_steps=0)
        for tiling in cutlass.BACKEND.tilings(geometry, "grad_weight", torch.bfloat16, product_device)
        if tiling.tile == wanted[tiling.family]
    )
    arguments = dense.layer_view(dy.double(), geometry), x.double(), geometry
    exact = dense.wgrad(*arguments)
    magnitude = dense.wgrad(*(abs(tensor) for tensor in arguments[:2]), geometry)
    if dtype is None:
        out = cutlass.BACKEND.wgrad(operand, x, geometry, tiling)
        assert out.dtype == x.dtype
        assert out.is_contiguous(memory_format=memory_format)
    else:
        elsewhere = torch.empty(exact.numel() + 1, dtype=dtype, device=product_device)[1:]  # where no kernel can write
        out = elsewhere.as_strided(exact.shape, exact.stride())
        assert cutlass.BACKEND.wgrad(operand, x, geometry, tiling._replace(splits=1), out) is out
        products.assert_close(out, exact.cpu(), magnitude.cpu(), geometry.positions)
        before = torch.randn_like(exact).to(dtype)
        out = before.clone(memory_format=torch.preserve_format)
        assert cutlass.BACKEND.wgrad(operand, x, geometry, tiling, out, accumulate=True) is out
        exact, magnitude = exact + before, magnitude + before.abs()
    products.assert_close(out, exact.cpu(), magnitude.cpu(), geometry.positions)


SHARING_GEOMETRIES = {
    "linear": LinearGeometry(700, 264, 192),
    "3x3": Conv2dGeometry.of((5, 72, 9, 8), (128, 72, 3, 3), (1, 1, 1, 1, 1, 1, 1), True),
}


@pytest.mark.parametrize("pass_name", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("name", SHARING_GEOMETRIES)
def test_tilings_that_share_tiles_deliver(product_device, name, pass_name):
    """Only Hopper's kernels do; with the number of multiprocessors that there is."""
    geometry = SHARING_GEOMETRIES[name]
    listed = cutlass.BACKEND.tilings(geometry, pass_name, torch.bfloat16, product_device)
    sharing = [tiling for tiling in listed if tiling.owned_steps > 0]
    if listed[0].family == "sm80":
        assert not sharing
        return
    memory_format = torch.channels_last if name == "3x3" else torch.contiguous_format
    x_shape = geometry.input_shape if name == "3x3" else (geometry.positions, geometry.in_channels)
    axis = 1 if pass_name == "grad_input" else 0
    dy = products.sparse_matrix(geometry.positions, geometry.out_channels, axis, torch.bfloat16).to(product_device)
    operand = products.stored(compress_matrix(dy, axis))
    other = torch.randn(geometry.weight_shape if axis == 1 else x_shape, device=product_device).bfloat16()
    other, gradient = other.contiguous(memory_format=memory_format), dense.layer_view(dy.double(), geometry)
    run, exactly = (cutlass.BACKEND.dgrad, dense.dgrad) if axis == 1 else (cutlass.BACKEND.wgrad, dense.wgrad)
    exact, magnitude = (
        exactly(gradient, other.double(), geometry),
        exactly(gradient.abs(), other.double().abs(), geometry),
    )
    terms = geometry.out_channels * 9 if axis == 1 else geometry.positions
    for tiling in sharing[:2]:
        out = run(operand, other, geometry, tiling)
        products.assert_close(out, exact.cpu(), magnitude.cpu(), terms)
    assert sharing


@pytest.mark.parametrize(("out_channels", "stride", "shares"), [(192, 1, False), (256, 1, True), (256, 2, False)])
def test_a_dgrad_shares_tiles_where_blocks_of_k_end_with_taps(hopper, out_channels, stride, shares):
    """The kernels refuse to share others."""
    window = (stride, stride, 1, 1, 1, 1, 1)
    geometry = Conv2dGeometry.of((8, 256, 28, 28), (out_channels, 256, 3, 3), window, True)
    for pass_name, expected in (("grad_input", shares), ("grad_weight", True)):
        listed = cutlass.BACKEND.tilings(geometry, pass_name, torch.float16, CUDA)
        assert any(tiling.owned_steps for tiling in listed) is expected


@pytest.mark.parametrize("multiprocessors", [4, 114, 132])
def test_shared_rounds_are_those_that_the_kernel_counts(multiprocessors):
    """A gathering wgrad has whole boxes of 64 columns for each tap: with other columns, another last round."""
    device = gpu.Device((9, 0), multiprocessors, wgmma=True)
    shared = 0
    for taps, c_in in itertools.product(((3, 3), (5, 5), (7, 7), (2, 4)), (24, 64, 72, 96, 416, 656)):
        for c_out in (136, 384, 512, 1024):
            geometry = Conv2dGeometry(2, c_in, 20, 20, c_out, 20, 20, taps, (1, 1), (1, 1), (1, 1), 1, True)
            for tiling in sparse_products.rank(geometry, "wgrad", device):
                if tiling.owned_steps:
                    rows, columns = map(int, tiling.tile.split("x"))
                    units = -(-c_out // (rows * tiling.cluster_size))
                    units *= -(-taps[0] * taps[1] * (-(-c_in // 64) * 64) // columns)
                    assert units % (multiprocessors // tiling.cluster_size) > 0, (geometry, tiling)
                    shared += 1
    assert shared


def gradients(layer_type, arguments, x, dy, config, backend):
    """(dX, dW, db) of a layer with fixed parameters and random numbers."""
    torch.manual_seed(5)
    layer = layer_type(*arguments, config=SDGPConfig(**config, backend=backend)).to("cuda", x.dtype)
    if x.dim() == 4:
        layer = layer.to(memory_format=torch.channels_last)
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    layer(x).backward(dy)
    return x.grad, *(parameter.grad for parameter in layer.parameters())


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < (1e-2 if a.dtype == torch.bfloat16 else 2e-3)


CONFIGS = [
    {}, {"prune": "random"}, {"prune": "rescale_magnitude"}, {"prune": "magnitude", "m": 8},
    {"prune": {"grad_input": "mvue", "grad_weight": "magnitude"}}, {"grad_weight": "dense"}, {"n": 1, "m": 16},
]  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_linear_equals_reference(config):
    x = torch.randn(3, 100, 192, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(3, 100, 264, device="cuda", dtype=torch.bfloat16)
    ours, theirs = (gradients(SDGPLinear, (192, 264), x, dy, config, backend) for backend in ("cutlass", "reference"))
    assert_close(ours, theirs)


@needs_gpu
@pytest.mark.parametrize("window", [(1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 2, 2)], ids=str)
@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_conv2d_equals_reference(config, window):
    kernel, stride, padding = window
    x = torch.randn(4, 64, 15, 14, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    y = torch.nn.functional.conv2d(x, x.new_zeros(136, 64, kernel, kernel), None, stride, padding)
    dy = torch.randn_like(y).to(memory_format=torch.channels_last)
    arguments = (64, 136, kernel, stride, padding)
    ours, theirs = (gradients(SDGPConv2d, arguments, x, dy, config, backend) for backend in ("cutlass", "reference"))
    assert_close(ours, theirs)


@needs_gpu
def test_channels_of_any_number_equal_reference():
    x = torch.randn(50, 36, device="cuda", dtype=torch.float16)
    dy = torch.randn(50, 20, device="cuda", dtype=torch.float16)
    ours, theirs = (gradients(SDGPLinear, (36, 20), x, dy, {}, backend) for backend in ("cutlass", "reference"))
    assert_close(ours, theirs)


@needs_gpu
def test_replays_of_a_graph_draw_anew():
    layer = SDGPLinear(64, 64, config=SDGPConfig(backend="cutlass")).to("cuda", torch.bfloat16)
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer(x).backward(dy)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    x.grad = layer.weight.grad = layer.bias.grad = None
    with torch.cuda.graph(graph):
        layer(x).backward(dy)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(x.grad.clone())
    assert not torch.equal(*results)


@pytest.mark.parametrize(("dgrad_shares", "wgrad_options"), [(True, {"splits": 3}), (False, {"owned_steps": 2})])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_what_kernels_use_that_run_at_once_is_apart(hopper, monkeypatch, dgrad_shares, wgrad_options, needs):
    """wgrad begins while dgrad runs: neither writes where the other reads or writes."""
    t, c, n = 1000, 520, 264
    made: dict[str, Any] = {}

    class Kernels:
        """Writes down what is asked of it."""

        PruneCompress = SparseGemm = staticmethod(lambda *name, **options: None)

        def Backward(self, sweeps, dgrad, wgrad):
            made.update(sweeps=sweeps, dgrad=dgrad, wgrad=wgrad)

        def bias_partial_rows(self, t, c):
            return 7

    kernels = Kernels()
    monkeypatch.setattr(cutlass_ops, "kernels", lambda: kernels)
    geometry, plan = LinearGeometry(t, n, c), decode(plan_string("linear", SDGPConfig()))
    dgrad_tiling = Tiling("sm90", "128x256", 2, 1, 1, owned_steps=2 * dgrad_shares)
    wgrad_tiling = Tiling("sm90", "128x128", 2, 1, 1)._replace(**wgrad_options)
    decision = Decision(geometry, cutlass.BACKEND, plan, True, "", Tilings(dgrad_tiling, wgrad_tiling))
    bound = SparseBackward(decision, Call((t, n), torch.bfloat16, CUDA, torch.bfloat16))
    size = 2 * bound._prepare((*needs, True)).block[0]
    padded_t, padded_c = -(-t // 128) * 128, -(-c // 64) * 64
    used = []  # bytes: begin, end
    if needs[0]:
        (values, metadata), workspace = made["dgrad"][1:]
        used += [(values, values + t * padded_c), (metadata, metadata + t * 2 * -(-padded_c // 128) * 8)]
        used.append((workspace, workspace + workspace_bytes(dgrad_tiling, t * n, 132)))
    if needs[1]:
        (values, metadata), workspace = made["wgrad"][1:]
        used += [(values, values + padded_t * c), (metadata, metadata + padded_t // 16 * 2 * c)]
        used.append((workspace, workspace + workspace_bytes(wgrad_tiling, c * n, 132)))
    bias_partials = made["sweeps"][0][4]
    used.append((bias_partials, bias_partials + 4 * c * 7))
    used.sort()
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(used))
    assert used[-1][1] <= size <= used[-1][1] + 1024
    assert all(begin % 16 == 0 for begin, _ in used)
