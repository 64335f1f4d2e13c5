"""Results say where they come from."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import sdgp_accel
from sdgp_accel import provenance as provenance_module
from sdgp_accel.provenance import git_revision, provenance


def test_everything_a_cpu_result_depends_on() -> None:
    origin = provenance(torch.device("cpu"))
    assert json.loads(json.dumps(origin)) == origin
    assert origin["gpu"] is None
    assert origin["cpu"]["name"]
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
    git("add", ".")
    git("commit", "-qm", "the package")
    assert git_revision() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True\n")
    assert git_revision() == git("rev-parse", "HEAD") + "+changes"


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
