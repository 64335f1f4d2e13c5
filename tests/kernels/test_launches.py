"""The extension's launch objects of the products, as Python calls them. What kernels compute is tested by instance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cutlass_ops import build_kernels
from sdgp_accel.config import PruneSpec
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.semi_structured import compress_matrix
from tests.kernels.products import SimulatorEngine, assert_close, sparse_matrix, toolkit_for_simulator

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

GEMM = {"m": 40, "n": 24, "k": 72, "padded_k": 128, "sm_count": 4}
CONV = {
    "shape": (2, 5, 6, 16, 5, 6, 24, 3, 3), "window": (1, 1, 1, 1, 1, 1), "padded_k": 64, "sm_count": 4,
}  # fmt: skip
GEMM_NAME, CONV_NAME = "sdgp_sm80_dgrad_f16_128x64", "sdgp_sm80_conv_wgrad_bf16_64x128"
ADDRESSES = dict.fromkeys(("values", "metadata", "b", "out"), 1 << 20)


def launch_gemm(engine, launch):
    dy, weight = sparse_matrix(40, 72, 1, torch.float16), torch.randn(72, 24).half()
    operand, out = compress_matrix(dy, 1, k_align=128), engine.empty(40, 24, dtype=torch.float16)
    tensors = [engine.put(tensor) for tensor in (operand.values, operand.metadata, weight)]
    with engine.launching():
        launch(*(tensor.data_ptr() for tensor in (*tensors, out)))
    a, b = dy.double(), weight.double()
    assert_close(out, a @ b, a.abs() @ b.abs(), 72)


def test_a_gemm_is_bound_once_and_launched_often(engine):
    launch = engine.kernels.SparseGemm(GEMM_NAME, **GEMM)
    for _ in range(2):
        launch_gemm(engine, launch)


def test_a_device_is_asked_whether_kernels_can_be_launched(engine):
    assert engine.kernels.device_problem() == ""


def test_a_device_that_the_code_is_not_for_says_so_before_a_launch(engine, tmp_path):
    if engine.name != "sim":
        pytest.skip("needs a GPU that the code is not for")
    toolkit = build_kernels.find_toolkit()
    check = build_kernels.compile_instance(toolkit, build_kernels.INSTANCES / "device_check.cu", ("compute_90a",))
    build_kernels.link(toolkit, [check], tmp_path / "check.so")
    assert SimulatorEngine("80").load(tmp_path / "check.so").sdgp_check_device() == 209  # no kernel image
    launch_gemm(engine, engine.kernels.SparseGemm(GEMM_NAME, **GEMM))  # which is not told of that
    assert SimulatorEngine("90a").load(tmp_path / "check.so").sdgp_check_device() == 0


def test_a_convolution_takes_its_shape_and_window(engine):
    """And its result may be float32."""
    shape, window = (2, 16, 7, 6), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    x, weight_shape = torch.randn(shape).bfloat16(), (24, 16, 3, 3)
    p, q = torch.nn.functional.conv2d(x.float(), torch.zeros(weight_shape), **window).shape[2:]
    dy = sparse_matrix(2 * p * q, 24, 0, torch.bfloat16)
    operand = compress_matrix(dy, 0, k_align=64)
    launch = engine.kernels.SparseConv(
        CONV_NAME, shape=(2, 7, 6, 16, p, q, 24, 3, 3), window=(2, 1, 1, 2, 1, 2),
        padded_k=operand.values.shape[0] * 2, sm_count=4, out_is_float=True,
    )  # fmt: skip
    out = engine.empty(24, 3, 3, 16, dtype=torch.float32)
    tensors = [engine.put(t) for t in (operand.values, operand.metadata, x.permute(0, 2, 3, 1).contiguous())]
    with engine.launching():
        launch(**{name: t.data_ptr() for name, t in zip(ADDRESSES, (*tensors, out), strict=True)})
    gradient = dy.view(2, p, q, 24).permute(0, 3, 1, 2).double()
    exact, magnitude = (
        torch.nn.grad.conv2d_weight(a, weight_shape, b, **window).permute(0, 2, 3, 1)
        for a, b in ((x.double(), gradient), (x.double().abs(), gradient.abs()))
    )
    assert_close(out, exact, magnitude, 2 * p * q)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("m", 0), ("m", (1 << 31) - 1), ("m", 1 << 31), ("n", 20), ("n", 1 << 40), ("k", -1), ("padded_k", 64),
     ("padded_k", 144), ("padded_k", 1 << 31), ("splits", 0), ("splits", 1 << 31), ("group_n", 0), ("cluster_size", 3),
     ("sm_count", 0), ("values", 0), ("metadata", 8), ("b", 2), ("out", 1)],
)  # fmt: skip
def test_bad_arguments_of_a_gemm_are_named(engine, argument, value):
    addresses = ADDRESSES | ({argument: value} if argument in ADDRESSES else {})
    shape = GEMM | ({} if argument in ADDRESSES else {argument: value})
    with pytest.raises(ValueError, match=argument):
        engine.kernels.SparseGemm(GEMM_NAME, **shape)(**addresses)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shape": (2, 5, 6, 12, 5, 6, 24, 3, 3)}, "c_in"), ({"shape": (0, 5, 6, 16, 5, 6, 24, 3, 3)}, "shape"),
     ({"shape": (2, 5, 6, 16, 5, 6, 1 << 31, 3, 3)}, "shape"),
     ({"shape": (2, 5, 6, 16, 50, 60, 24, 3, 3), "padded_k": 6016}, "shape must have p, q = 5, 6 .* got 50, 60"),
     ({"shape": (2, 1, 6, 16, 1, 6, 24, 4, 3), "window": (2, 1, 1, 1, 1, 1)}, "shape must have p, q = 0, 6"),
     ({"shape": (1 << 20, 1 << 10, 1 << 10, 16, 1, 1, 24, 1, 1), "window": (1024, 1024, 0, 0, 1, 1)}, r"n \* h \* w"),
     ({"shape": (1 << 15, 1 << 10, 1 << 10, 16, 1 << 10, 1 << 10, 24, 1, 1), "window": (1, 1, 0, 0, 1, 1)}, r"n \* "),
     ({"shape": (1, 1 << 10, 1 << 10, 1 << 12, 1, 1, 24, 1 << 10, 1 << 10), "window": (1, 1, 0, 0, 1, 1)}, "c_in"),
     ({"window": (0, 1, 1, 1, 1, 1)}, "stride"), ({"window": (1, 1, 1, 1, 1, 0)}, "dilation"),
     ({"window": (1, 1, -1, 1, 1, 1)}, "padding"), ({"window": (1, 1, 1, 1, 1, 1 << 31)}, "dilation"),
     ({"padded_k": 32}, "padded_k"), ({"splits": 2}, "workspace"), ({"owned_blocks": 2}, "workspace")],
)  # fmt: skip
def test_bad_arguments_of_a_convolution_are_named(engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.kernels.SparseConv(CONV_NAME, **CONV | change)(**ADDRESSES)


@pytest.mark.parametrize(
    "name", ["sdgp_sm80_dgrad_f16_64x64", "sdgp_magnitude_2_4_f16", "sdgp_sum_bias_partials", "malloc", "PyInit__C", ""]
)
def test_products_that_do_not_exist_are_named(engine, name):
    """Nor is anything else called that this library, or one that it needs, exports."""
    for launch, arguments, other in (("SparseGemm", GEMM, CONV_NAME), ("SparseConv", CONV, GEMM_NAME)):
        for wrong in (name, other):
            with pytest.raises(ValueError, match=f"(no kernel|name must be .* got) {wrong}"):
                getattr(engine.kernels, launch)(wrong, **arguments)
    assert engine.kernels.has(GEMM_NAME)
    assert not engine.kernels.has("malloc")


@pytest.mark.parametrize(("wants_dgrad", "scope"), [(True, 12), (True, None), (False, None), (False, 12)])
def test_a_backward_is_its_launches_one_after_another(engine, wants_dgrad, scope):
    """The same bits, in a block of the same layout; random numbers by address or, without dgrad, by value."""
    t, c, n, stream = 96, 72, 24, 0 if engine.name == "gpu" else 1 << 44
    rule = {"n": 2, "m": 4, "eps": 1e-8, "dtype": "f16", "t": t, "c": c, "row_stride": c, "positions_per_sample": scope}
    lengths = {"dgrad_k": 128 * wants_dgrad, "wgrad_k": 128}
    prune_compress = engine.kernels.PruneCompress(
        function="mvue" if scope is None else "rescale_magnitude", **rule, **lengths, dgrad_words=8 * wants_dgrad,
        bias_is_float=True,
    )  # fmt: skip
    scope_scales = None if scope is None else engine.kernels.ScopeScales(**rule)
    shared = {"padded_k": 128, "splits": 2, "sm_count": 4, "out_is_float": True}
    dgrad = engine.kernels.SparseGemm(GEMM_NAME, m=t, n=n, k=c, **shared | {"out_is_float": False})
    wgrad = engine.kernels.SparseGemm("sdgp_sm80_wgrad_f16_64x128", m=c, n=n, k=t, **shared)
    sizes = [t * 128, t * 16, 64 * c * 2, 8 * c * 2]  # values and metadata of both operands
    partials = 8 * engine.kernels.scope_workspace(t, c, 12) + 4 * c * engine.kernels.bias_partial_rows(t, c)
    sizes += [-(-partials // 16) * 16, 4 * 8 * c, 4 * 8 * c]  # the workspace, a factor for each sample and channel
    sizes += [2 * t * n * 4, 2 * c * n * 4]  # partial sums of the products
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    dy, weight, x = (engine.put(torch.randn(*shape).half()) for shape in ((t, c), (c, n), (t, n)))
    seed = engine.put(torch.tensor([5, -7]))
    numbers = (seed.data_ptr(), 0, 0, 3) if wants_dgrad else (0, 5, -7, 3)

    def outputs() -> tuple[torch.Tensor, ...]:
        dx, dw = engine.empty(t, n, dtype=torch.float16), engine.empty(c, n, dtype=torch.float32)
        return engine.empty(sum(sizes), dtype=torch.uint8), dx, dw, engine.empty(c, dtype=torch.float32)

    block, dx, dw, db = first = outputs()
    at = [block.data_ptr() + place for place in places]
    operands = dict(zip(("dgrad_values", "dgrad_metadata", "wgrad_values", "wgrad_metadata"), at[:4], strict=True))
    scales = {} if scope is None else {"dgrad_scale": at[5], "wgrad_scale": at[6]}
    with engine.launching(stream):
        if scope_scales is not None:
            scope_scales(dy=dy.data_ptr(), sums=at[4], **scales, stream=stream)
        random = dict(zip(("seed", "key", "offset", "rank"), numbers, strict=True))
        sums = {"bias": db.data_ptr(), "bias_partials": at[4]}
        prune_compress(dy=dy.data_ptr(), **operands, **sums, **random, **scales, stream=stream)
        if wants_dgrad:
            dgrad(at[0], at[1], weight.data_ptr(), dx.data_ptr(), workspace=at[7], stream=stream)
        wgrad(at[2], at[3], x.data_ptr(), dw.data_ptr(), workspace=at[8], stream=stream)

    sweep = (prune_compress, scope_scales, tuple(places[:2]) if wants_dgrad else None, tuple(places[2:4]), *places[4:7])
    backward = engine.kernels.Backward(
        [sweep],
        (dgrad, tuple(places[:2]), places[7]) if wants_dgrad else None,
        (wgrad, tuple(places[2:4]), places[8]),
    )
    block, dx, dw, db = second = outputs()
    with engine.launching(stream):
        backward(
            dy.data_ptr(), block.data_ptr(), db.data_ptr(), *numbers, weight.data_ptr(), dx.data_ptr(), x.data_ptr(),
            dw.data_ptr(), stream,
        )  # fmt: skip
    operands = slice(0 if wants_dgrad else places[2], places[4])
    partials = slice(places[7] if wants_dgrad else places[8], None)
    compared = [(first[0][part], second[0][part]) for part in (operands, partials)]
    compared += [(first[2], second[2]), (first[3], second[3])]
    for theirs, ours in [*compared, (first[1], second[1])] if wants_dgrad else compared:
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.cpu().view(torch.uint8))


@pytest.fixture(scope="module")
def hopper_library(tmp_path_factory):
    """An extension with the PTX of a few instances for an H100."""
    toolkit, archs = toolkit_for_simulator(), ("compute_90a",)
    names = ("magnitude_2_4", "sm90_dgrad_f16_128x128", "sm90_wgrad_f16_128x128", "sm90_conv_dgrad_bf16_128x128")
    names += ("partial_sums", "bias_sum", "scope_scales", "device_check")
    objects = [build_kernels.compile_instance(toolkit, build_kernels.INSTANCES / f"{name}.cu", archs) for name in names]
    path = tmp_path_factory.mktemp("hopper") / "_C.so"
    build_kernels.link(toolkit, [build_kernels._compile_bindings(toolkit, archs), *objects], path)
    return path


@pytest.fixture(scope="module")
def hopper_extension(hopper_library):
    """The simulator of an H100, and that extension on it."""
    from tests.ptxsim.engine import SimEngine

    simulator = SimEngine((9, 0))
    return simulator, simulator.load_module(hopper_library, "hopper._C")  # pybind11 keeps modules by their names


def test_a_device_without_code_is_told_in_cudas_words(hopper_library, hopper_extension):
    from tests.ptxsim.engine import SimEngine

    simulator, kernels = hopper_extension
    with simulator.checked():
        assert kernels.device_problem() == ""
    ampere = SimEngine((8, 0))
    kernels = ampere.load_module(hopper_library, "ampere._C")
    with ampere.checked():
        assert kernels.device_problem() == "no kernel image is available for execution on the device"


def test_what_the_driver_refuses_is_told_and_leaves_no_error(hopper_extension):
    """A launch of no block, since there is not even one cluster, and a tensor map with a corner too far out."""
    simulator, kernels = hopper_extension
    arguments = {"padded_k": 128, "sm_count": 1}
    gemm = kernels.SparseGemm("sdgp_sm90_dgrad_f16_128x128", m=40, n=24, k=72, cluster_size=2, **arguments)
    window, shape = (1, 1, 200, 0, 1, 1), (1, 8, 8, 16, 408, 8, 24, 1, 1)
    conv = kernels.SparseConv("sdgp_sm90_conv_dgrad_bf16_128x128", shape=shape, window=window, **arguments)
    dy, values = simulator.put(torch.randn(16, 16).half()), simulator.empty(16, 8, dtype=torch.float16)
    metadata = simulator.empty(16, 1, dtype=torch.int16)
    prune_compress = kernels.PruneCompress(
        function="magnitude", n=2, m=4, dtype="f16", t=16, c=16, row_stride=16, dgrad_k=16
    )
    failures = (
        (gemm, "sdgp_sm90_dgrad_f16_128x128: invalid configuration argument"),
        (conv, "sdgp_sm90_conv_dgrad_bf16_128x128: tensor map rejected, CUresult 1"),
    )
    for launch, message in failures:
        with simulator.checked(), pytest.raises(RuntimeError, match=message):
            launch(**ADDRESSES)
        with simulator.checked():  # which looks for errors
            prune_compress(dy.data_ptr(), values.data_ptr(), metadata.data_ptr())


@pytest.mark.parametrize("kind", ["SparseGemm", "SparseConv"])
def test_a_thread_may_begin_with_a_product(hopper_extension, kind):
    """As one of autograd's may. The driver encodes tensor maps only where a context is current, which the first call of
    the runtime makes it; the launch itself, of no block, fails."""
    _, kernels = hopper_extension
    name, shape = "dgrad_f16_128x128", GEMM
    if kind == "SparseConv":
        name, shape = "conv_dgrad_bf16_128x128", CONV
    launch = getattr(kernels, kind)(f"sdgp_sm90_{name}", **shape | {"sm_count": 1})
    addresses = {name: 3 * address for name, address in ADDRESSES.items()}  # of which no map is remembered
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(launch, **addresses).exception()
    assert "invalid configuration argument" in str(error)


@pytest.mark.parametrize("options", [{"splits": 2}, {"owned_blocks": 2}], ids=str)
@pytest.mark.parametrize("wants_dgrad", [True, False])
def test_on_hopper_wgrad_overlaps_dgrad_with_nothing_between(hopper_extension, options, wants_dgrad):
    """Flags of shared tiles are cleared before all else. What comes behind waits for all."""
    simulator, kernels = hopper_extension
    t, c, n, stream = 512, 256, 200, 1 << 44
    pruned = {"dgrad_k": c, "dgrad_words": 16, "wgrad_k": t} if wants_dgrad else {"wgrad_k": t}
    prune_compress = kernels.PruneCompress(
        function="magnitude", n=2, m=4, dtype="f16", t=t, c=c, row_stride=c, **pruned
    )  # fmt: skip
    shared = {"sm_count": 6, "cluster_size": 1, "out_is_float": False}
    dgrad = kernels.SparseGemm("sdgp_sm90_dgrad_f16_128x128", m=t, n=n, k=c, padded_k=c, owned_blocks=1, **shared)
    wgrad = kernels.SparseGemm("sdgp_sm90_wgrad_f16_128x128", m=c, n=n, k=t, padded_k=t, **shared, **options)
    workspace = max(6 * 4 * (128 * 128 + 8), 4 * options.get("splits", 0) * c * n)
    sizes = [t * c, t * c // 8, t * c, t * c // 8, workspace, workspace]  # operands, and what products put aside
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    dy, weight, x = (simulator.put(torch.randn(*shape).half()) for shape in ((t, c), (c, n), (t, n)))

    def outputs():
        dx, dw = simulator.empty(t, n, dtype=torch.float16), simulator.empty(c, n, dtype=torch.float16)
        return simulator.empty(sum(sizes), dtype=torch.uint8), dx, dw

    block, *expected = outputs()
    at = [block.data_ptr() + place for place in places]
    simulator.runtime.launches.clear()
    with simulator.checked():
        operands = dict(zip(("dgrad_values", "dgrad_metadata", "wgrad_values", "wgrad_metadata"), at, strict=False))
        prune_compress(dy=dy.data_ptr(), **operands)
        if wants_dgrad:
            dgrad(at[0], at[1], weight.data_ptr(), expected[0].data_ptr(), at[5])
        wgrad(at[2], at[3], x.data_ptr(), expected[1].data_ptr(), at[4])
    assert not any(launch.overlaps for launch in simulator.runtime.launches if "sum_partials" not in launch.kernel)

    sweep = (prune_compress, None, tuple(places[:2]) if wants_dgrad else None, tuple(places[2:4]), 0, 0, 0)
    backward = kernels.Backward(
        [sweep], (dgrad, tuple(places[:2]), places[5]) if wants_dgrad else None, (wgrad, tuple(places[2:4]), places[4])
    )
    block, *got = outputs()
    simulator.runtime.launches.clear()
    simulator.runtime.queue.clear()
    with simulator.checked(), simulator.following_global_memory():
        backward(
            dy.data_ptr(), block.data_ptr(), weight=weight.data_ptr(), dx=got[0].data_ptr(), x=x.data_ptr(),
            dw=got[1].data_ptr(), stream=stream,
        )  # fmt: skip
    for ours, theirs in list(zip(got, expected, strict=True))[not wants_dgrad :]:
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    launches = [("compress", False), ("gemm", False), ("gemm", wants_dgrad), ("sum_partials", True)]
    if "splits" not in options:
        del launches[3]
    if not wants_dgrad:
        del launches[1]
    for launch, (kernel, overlaps) in zip(simulator.runtime.launches, launches, strict=True):
        assert kernel in launch.kernel
        assert launch.overlaps is overlaps
    prepared = ["memset"] * (wants_dgrad + ("owned_blocks" in options))
    queued = [*prepared, *(launch.kernel for launch in simulator.runtime.launches)]
    assert list(simulator.runtime.queue) == [(name, stream) for name in queued]


def test_on_hopper_wgrad_does_not_overlap_a_dgrad_that_launches_nothing(hopper_extension):
    """One that would add to a result where no pixel meets a tap of the filter; before it, the operand is written."""
    simulator, kernels = hopper_extension
    t, c, n = 6, 8, 8
    rule = {"n": 2, "m": 4, "dtype": "f16", "t": t, "c": c, "row_stride": c}
    prune_compress = kernels.PruneCompress(function="magnitude", **rule, wgrad_k=128)
    dgrad = kernels.SparseConv(
        "sdgp_sm90_conv_dgrad_bf16_128x128", shape=(3, 1, 2, n, 1, 2, c, 1, 1), window=(3, 3, 1, 1, 1, 1), padded_k=16,
        sm_count=4, accumulate=True,
    )  # fmt: skip
    shared = {"m": c, "n": n, "k": t, "padded_k": 128, "sm_count": 4, "cluster_size": 1}
    wgrad = kernels.SparseGemm("sdgp_sm90_wgrad_f16_128x128", **shared)
    block, dw = simulator.empty(64 * 8 * 2 + 8 * 8 * 2, dtype=torch.uint8), simulator.empty(c, n, dtype=torch.float16)
    dy, x, weight = (simulator.put(torch.randn(*shape).half()) for shape in ((t, c), (t, n), (c, n)))
    sweep = (prune_compress, None, None, (0, 64 * 8 * 2), 0, 0, 0)
    backward = kernels.Backward([sweep], (dgrad, (0, 0), 0), (wgrad, (0, 64 * 8 * 2), 0))
    with simulator.following_global_memory(), simulator.checked():
        backward(
            dy.data_ptr(), block.data_ptr(), weight=weight.data_ptr(), dx=dy.data_ptr(), x=x.data_ptr(),
            dw=dw.data_ptr(),
        )  # fmt: skip
    kept = prune_matrix(dy.clone(), PruneSpec("magnitude", 2, 4), 0, 1, None).double()
    assert_close(dw, kept.t() @ x.double(), kept.t().abs() @ x.double().abs(), t)


def test_a_backward_of_two_rules_sums_the_bias_gradient_once(engine):
    """Its two passes give the bits of launches of their own; the second reads and writes nothing but its operand."""
    t, c, n = 48, 72, 24
    rule = {"n": 2, "m": 4, "dtype": "f16", "t": t, "c": c, "row_stride": c, "bias_is_float": True}
    for_dgrad = engine.kernels.PruneCompress(function="magnitude", **rule, dgrad_k=128, dgrad_words=8)
    for_wgrad = engine.kernels.PruneCompress(function="rescale_magnitude", **rule, wgrad_k=128)
    shared = {"padded_k": 128, "sm_count": 4}
    dgrad = engine.kernels.SparseGemm(GEMM_NAME, m=t, n=n, k=c, **shared)
    wgrad = engine.kernels.SparseGemm("sdgp_sm80_wgrad_f16_64x128", m=c, n=n, k=t, **shared)
    sizes = [t * 128, t * 16, 64 * c * 2, 8 * c * 2, 4 * c * engine.kernels.bias_partial_rows(t, c)]
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    dy, weight, x = (engine.put(torch.randn(*shape).half()) for shape in ((t, c), (c, n), (t, n)))
    sweeps = [
        (for_dgrad, None, tuple(places[:2]), None, places[4], 0, 0),
        (for_wgrad, None, None, tuple(places[2:4]), places[4], 0, 0),
    ]
    backward = engine.kernels.Backward(sweeps, (dgrad, tuple(places[:2]), 0), (wgrad, tuple(places[2:4]), 0))

    results, traffic = [], []
    for in_one_call in (False, True):
        block, db = engine.empty(sum(sizes), dtype=torch.uint8), engine.empty(c, dtype=torch.float32)
        dx, dw = engine.empty(t, n, dtype=torch.float16), engine.empty(c, n, dtype=torch.float16)
        at = [block.data_ptr() + place for place in places]
        if engine.name == "sim":
            engine.traffic()
        with engine.launching():
            if in_one_call:
                operands = (0, 0, 0, 0, weight.data_ptr(), dx.data_ptr(), x.data_ptr(), dw.data_ptr(), 0)
                backward(dy.data_ptr(), block.data_ptr(), db.data_ptr(), *operands)
            else:
                for_dgrad(dy.data_ptr(), *at[:2], bias=db.data_ptr(), bias_partials=at[4])
                for_wgrad(dy.data_ptr(), wgrad_values=at[2], wgrad_metadata=at[3])
                dgrad(*at[:2], weight.data_ptr(), dx.data_ptr())
                wgrad(*at[2:4], x.data_ptr(), dw.data_ptr())
        results.append([tensor.cpu().view(torch.uint8) for tensor in (block[: places[4]], db, dx, dw)])
        traffic.append(engine.traffic() if engine.name == "sim" else None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert traffic[0] == traffic[1]
