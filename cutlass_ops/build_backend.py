"""setuptools' build backend; it also asks for a CUDA compiler where the extension is to be built and none is here."""

from __future__ import annotations

from typing import Any

import build_kernels  # beside this file: pyproject.toml names this folder as backend-path
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *build_kernels.requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """PEP 660."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *build_kernels.requirements()]
