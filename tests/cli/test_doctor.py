"""`sdgp doctor` on machines we do not have: the GPU and the extension are stood in for."""

import json
import sys
import types

import pytest
import torch
from click.testing import CliRunner

from sdgp_accel.cli import doctor, main


def run(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture
def hopper(monkeypatch):
    gpu = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_gpu_names_the_reference_backend_and_asks_for_nothing(no_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cutlass_ops", None)
    result = run()
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "reference" in result.output
    assert doctor.BUILD_COMMAND not in result.output


@pytest.mark.parametrize("extension", [None, types.ModuleType("cutlass_ops")], ids=["absent", "source folder only"])
def test_idle_gpu_is_an_error_with_the_command_that_fixes_it(hopper, monkeypatch, extension):
    monkeypatch.setitem(sys.modules, "cutlass_ops", extension)
    result = run()
    assert result.exit_code == 1
    assert f"fix: {doctor.BUILD_COMMAND}" in result.output


def test_built_extension_names_its_architectures(hopper, monkeypatch):
    extension = types.ModuleType("cutlass_ops")
    extension.ARCHS = ("80", "90a", "compute_90")
    monkeypatch.setitem(sys.modules, "cutlass_ops", extension)
    result = run("--json")
    assert result.exit_code == 0
    findings = {finding["what"]: finding for finding in json.loads(result.output)}
    assert "sm_80, sm_90a, compute_90" in findings["cutlass_ops"]["value"]
    assert "H100" in findings["GPU 0"]["value"]


def test_missing_extra_names_the_install_command(no_gpu, monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "report", ("no_such_module",))
    assert "fix: pip install 'sdgp_accel[report]'" in run().output


def test_a_model_is_placed_layer_by_layer(no_gpu):
    result = run("resnet9", "--batch", "512", "--arch", "80")
    assert result.exit_code == 0
    assert "sm80 256x128" in result.output
    layers = json.loads(run("resnet9", "--json").output)["layers"]
    assert {layer["wgrad"].split()[0] for layer in layers} >= {"dense", "sm90"}
