"""Everything static is in pyproject.toml; this file adds the CUDA extension where one is wanted."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Not as part of its package, which would load the extension.
sys.path.insert(0, str(Path(__file__).parent / "cutlass_ops"))
import build_kernels


class BuildKernels(build_ext):
    """Hands the extension to build_kernels, which knows how to run nvcc."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build_kernels.build(Path(self.get_ext_fullpath(ext.name)))
        except build_kernels.BuildError as error:
            raise SystemExit(f"{error}\n\nsdgp_accel: SDGP_CUDA=0 installs it without its CUDA kernels") from error


if build_kernels.is_wanted():
    modules = [Extension("cutlass_ops._C", [])]
else:
    modules = []
    why = "SDGP_CUDA=0" if os.environ.get("SDGP_CUDA") else "no NVIDIA GPU, no nvcc; SDGP_CUDA=1 builds them"
    print(f"sdgp_accel: without its CUDA kernels ({why})", file=sys.stderr)

setup(ext_modules=modules, cmdclass={"build_ext": BuildKernels})
