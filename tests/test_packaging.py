"""Wheel and sdist hold what the package reads at run time and the kernels' sources, and nothing of bench/ or tests/."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "*.so", "__pycache__")


def test_contents_of_wheel_and_sdist(tmp_path):
    # In a copy, because setuptools leaves build/ and *.egg-info beside what it builds.
    sources = shutil.copytree(ROOT, tmp_path / "sources", ignore=NOT_SOURCES)
    for kind in ("sdist", "wheel"):
        build = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
        command = [sys.executable, "-c", build, tmp_path]
        environment = os.environ | {"SDGP_CUDA": "0"}
        output = subprocess.run(command, cwd=sources, env=environment, check=True, capture_output=True, text=True)
        assert "Package would be ignored" not in output.stderr  # by a later setuptools
    packages = [sources / name for name in ("sdgp_accel", "cutlass_ops")]
    expected = {str(path.relative_to(sources)) for package in packages for path in package.rglob("*") if path.is_file()}
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert expected <= held
    assert not {name.split("/")[0] for name in held} & {"bench", "tests"}
