"""Build only: the import map and the C++ sources. Everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

# The folder kernels/ installs as transcoder.kernels: the bare name `kernels` belongs to Hugging Face's package.
kernel_packages = ["transcoder.kernels", *(f"transcoder.kernels.{name}" for name in find_packages("kernels"))]

# csrc/ travels as data inside it and is compiled at first use (kernels/extension.py).
sources = "transcoder.kernels.csrc"

setup(
    packages=[*find_packages(include=["transcoder", "transcoder.*"]), *kernel_packages, sources],
    package_dir={"transcoder": "transcoder", "transcoder.kernels": "kernels", sources: "csrc"},
)
