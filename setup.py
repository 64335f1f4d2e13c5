"""Everything static is in pyproject.toml; this file exists for what has to be computed at build time."""

from setuptools import setup

setup()
