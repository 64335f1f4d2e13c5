"""The wheel holds everything the package reads at run time, and nothing of bench/ or tests/."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__")


def test_wheel_contents(tmp_path):
    # In a copy, because setuptools leaves build/ and *.egg-info beside what it builds.
    sources = shutil.copytree(ROOT, tmp_path / "sources", ignore=NOT_SOURCES)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    environment = os.environ | {"SDGP_CUDA": "0"}
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=sources, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("sdgp_accel/")}
        others = {name.split("/")[0] for name in archive.namelist()} - {"sdgp_accel"}
    package = sources / "sdgp_accel"
    assert held == {str(path.relative_to(sources)) for path in package.rglob("*") if path.is_file()}
    assert not others & {"bench", "tests"}
