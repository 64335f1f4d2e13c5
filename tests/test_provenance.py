"""Results say where they come from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sdgp_accel
from sdgp_accel import provenance as provenance_module
from sdgp_accel.provenance import git_revision, gpu_state, provenance


def test_everything_a_cpu_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    origin = provenance(torch.device("cpu"))
    assert json.loads(json.dumps(origin)) == origin
    assert origin["gpu"] is None
    assert origin["cpu"]["name"] not in ("", "model name")
    assert (origin["cpu"]["cores"], origin["cpu"]["threads"]) == (os.cpu_count(), 99)
    assert origin["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert origin["sdgp_accel"] == sdgp_accel.__version__
    assert origin["time"].endswith("+00:00")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    package = tmp_path / "sdgp_accel"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance_module.sdgp_accel, "__file__", str(package / "__init__.py"))
    git("init", "-q")
    (tmp_path / "other.txt").write_text("")
    git("add", "other.txt")
    git("commit", "-qm", "somebody else's repository")
    assert git_revision() is None  # the package lies in it but does not belong to it
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "step_time.json").write_text("of the last time")
    git("add", ".")
    git("commit", "-qm", "the package")
    (package / "notes.txt").write_text("not the repository's")
    (results / "step_time.json").write_text("of this time")
    assert git_revision() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True\n")
    assert git_revision() == git("rev-parse", "HEAD") + "+changes"


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
    monkeypatch.setenv("SDGP_GIT_REVISION", "0123abc")
    assert git_revision() == "0123abc"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, uuid="1234-abcd"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


def test_gpu_state_is_that_of_the_gpu_asked_for(one_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--id=GPU-1234-abcd*) ;; *) exit 1;; esac\n'
        "echo '580.82, P0, 1755 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 412.50 W, 700.00 W, 51, 0x0000000000000004'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    origin = provenance(torch.device("cuda"))
    assert origin["gpu"]["name"] == "NVIDIA H100"
    assert origin["gpu"]["capability"] == "9.0"
    state = origin["gpu"]["state"]
    assert (state["driver_version"], state["clocks.sm"], state["power.draw"]) == ("580.82", "1755 MHz", "412.50 W")
    program.write_text("#!/bin/sh\nexit 6\n")  # it does not know the GPU
    assert gpu_state(torch.device("cuda")) == {}


def test_no_nvidia_smi_is_no_error(one_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_state(torch.device("cuda")) == {}
