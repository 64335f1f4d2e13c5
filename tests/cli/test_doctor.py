"""`sdgp doctor` on machines we do not have: the GPU and the extension are stood in for."""

import json
import types

import pytest
import torch
from click.testing import CliRunner

import cutlass_ops
from cutlass_ops import build_kernels
from sdgp_accel import placement
from sdgp_accel.backends import gpu
from sdgp_accel.cli import doctor, main


def run(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture
def gpus(monkeypatch):
    """Makes GPUs of these compute capabilities be here."""

    def be_here(*capabilities):
        def properties(index):
            major, minor = capabilities[index]
            size = {"total_memory": 80 * 2**30, "multi_processor_count": 148}
            return types.SimpleNamespace(name=f"GPU {index}", major=major, minor=minor, **size)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capabilities[device])
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    return be_here


@pytest.fixture
def no_gpu(gpus):
    gpus()


@pytest.fixture
def extension(monkeypatch, tmp_path):
    """Makes an extension be built for these architectures, from the sources here or from others; () for none."""

    def be_built(*archs, sources="these", error="", problem=""):
        file = tmp_path / "_C.so"
        if archs:
            text = build_kernels.stamp(archs)
            file.write_text(text if sources == "these" else text.replace(build_kernels.source_digest(), "0" * 64))
        monkeypatch.setattr(cutlass_ops, "path", lambda: file if archs else None)
        monkeypatch.setattr(cutlass_ops, "load_error", lambda: error)
        monkeypatch.setattr(cutlass_ops, "ARCHS", () if error else archs)
        monkeypatch.setattr(gpu, "launch_problem", lambda device: problem)

    return be_built


def test_without_gpu_names_the_reference_backend_and_asks_for_nothing(no_gpu, extension):
    extension()
    result = run()
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "reference" in result.output
    assert "pip install --no-cache-dir" not in result.output


H100, RTX3090, ORIN = (9, 0), (8, 6), (8, 7)


@pytest.mark.parametrize(
    ("here", "archs", "change", "says", "rebuilt_for"),
    [
        ([H100], (), {}, "not built", "90a"),
        ([H100], ("90a",), {"error": "file too short"}, "does not load: file too short", "90a"),
        ([RTX3090], ("90a",), {}, "not for 86", "86"),
        ([H100, RTX3090], ("90a",), {}, "not for 86", "'90a;86'"),
        ([H100], ("80", "90"), {}, "without the faster kernels of sm_90a", "90a"),
        ([H100], ("90a",), {"sources": "others"}, "from other sources", "90a"),
        ([H100], ("90a",), {"problem": "too old a driver"}, "CUDA does not run it: too old a driver; update", "90a"),
        ([ORIN], ("80", "86", "89"), {}, "not for 87", "87"),
        ([RTX3090], ("compute_90",), {}, "not for 86", "86"),
    ],
)
def test_a_gpu_that_the_build_is_not_for_is_an_error(gpus, extension, here, archs, change, says, rebuilt_for):
    gpus(*here)
    extension(*archs, **change)
    result = run()
    assert result.exit_code == 1
    assert says in result.output
    # In a checkout, Python finds what lies in it before what is installed.
    assert f"fix: SDGP_CUDA_ARCHS={rebuilt_for} SDGP_CUDA=1 pip install --no-cache-dir --editable ." in result.output


def test_a_missing_runtime_is_to_be_installed(gpus, extension):
    """torch for CUDA 12 does not bring that of 13: building anew would not help."""
    gpus(H100)
    extension("90a", error="libcudart.so.13: cannot open shared object file: No such file or directory")
    result = run()
    assert result.exit_code == 1
    assert "fix: pip install 'nvidia-cuda-runtime==13.*'" in result.output
    gpus()
    assert "fix: pip install 'nvidia" not in run().output


def test_ptx_of_hoppers_own_kernels_is_enough(gpus, extension):
    gpus(H100)
    extension("compute_90a")
    assert "without the faster kernels" not in run().output
    gpu.hardware.cache_clear()
    assert gpu.device_facts(0).wgmma
    gpu.hardware.cache_clear()


def test_nothing_runs_on_kernels_of_other_gpus(gpus, extension):
    gpus(RTX3090)
    extension("90a")
    assert "dense: nothing is accelerated" in run().output
    gpus((9, 0))
    extension("80")
    assert "dense: nothing is accelerated" in run().output
    extension("90a", problem="too old a driver")
    assert "dense: nothing is accelerated" in run().output


@pytest.mark.parametrize(
    ("gpu", "archs"), [((8, 0), ("80",)), ((8, 6), ("80",)), ((12, 0), ("compute_90",)), ((9, 0), ("80", "90a"))]
)
def test_a_gpu_that_the_build_is_for(gpus, extension, gpu, archs):
    gpus(gpu)
    extension(*archs)
    result = run("--json")
    assert result.exit_code == 0
    findings = {finding["what"]: finding for finding in json.loads(result.output)}
    assert findings["cutlass_ops"]["value"] == f"built for {', '.join(map(doctor.architecture, archs))}"
    assert findings['backend="auto"']["value"].startswith("cutlass")
    assert f"sm_{gpu[0]}{gpu[1]}" in findings["GPU 0"]["value"]
    assert "no sparse tensor cores" not in findings["GPU 0"]["value"]


def test_an_installation_without_sources_is_not_compared_with_them(gpus, extension, monkeypatch, tmp_path):
    gpus(H100)
    extension("90a", sources="others")
    monkeypatch.setattr(build_kernels, "INSTANCES", tmp_path / "nowhere")
    result = run()
    assert result.exit_code == 0
    assert "from other sources" not in result.output


def test_gpus_without_cuda_have_no_sparse_tensor_cores(gpus, extension, monkeypatch):
    gpus((9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls an AMD GPU a CUDA device
    extension()
    result = run()
    assert result.exit_code == 0
    assert "GPU 0, not NVIDIA's, 80 GiB, no sparse tensor cores" in result.output


def test_missing_extra_names_the_install_command(no_gpu, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "report", ("no_such_module",))
    assert "fix: pip install 'sdgp_accel[report]'" in run().output


def test_a_model_is_placed_layer_by_layer(no_gpu):
    result = run("resnet9", "--batch", "512", "--arch", "80")
    assert result.exit_code == 0
    assert "sm80 256x128" in result.output
    layers = json.loads(run("resnet9", "--json").output)["layers"]
    assert {layer["wgrad"].split()[0] for layer in layers} >= {"dense", "sm90"}


def test_a_table_leaves_out_nothing(no_gpu, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("resnet9", "--arch", "90")
    assert "…" not in result.output
    assert "3 input channels" in " ".join(result.output.split())


def test_a_model_is_placed_on_the_gpu_that_is_here(gpus, extension):
    extension()
    gpus((7, 5), (10, 0))
    layers = json.loads(run("resnet9", "--json").output)["layers"]
    assert {layer["wgrad"].split()[0] for layer in layers} == {"dense", "sm80"}


def test_of_several_gpus_the_first_is_the_one_to_place_a_model_on(gpus, extension, monkeypatch):
    asked = []
    monkeypatch.setattr(placement, "placements", lambda net, batch, device: asked.append(device) or ())
    extension()
    for here in ([(7, 5), (8, 0), (9, 0)], [(9, 0), (8, 0)]):
        gpus(*here)
        assert run("digits", "--json").exit_code == 1  # no kernels for them
    assert "digits, batch 64, on sm_90" in run("digits").output
    assert asked[:2] == [gpu.Device((8, 0), 148), gpu.Device((9, 0), 148, wgmma=True)]


def test_without_a_gpu_nothing_is_an_error(no_gpu, extension):
    extension("90a", sources="others")
    assert run().exit_code == 0
