"""Build only: the import map and the C++ sources. Everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_namespace_packages, setup

# Folders of data (presets, templates, the demo's language model) are packages too: setuptools wants each of them named.
found = find_namespace_packages(include=["transcoder", "transcoder.*"], exclude=["*__pycache__*"])

# The folder kernels/ installs as transcoder.kernels: the bare name `kernels` belongs to Hugging Face's package.
kernels = [f"transcoder.kernels.{name}" for name in find_namespace_packages("kernels", exclude=["*__pycache__*"])]

# csrc/ travels as data inside it and is compiled at first use (kernels/extension.py).
sources = "transcoder.kernels.csrc"

setup(
    packages=[*found, "transcoder.kernels", *kernels, sources],
    package_dir={"transcoder": "transcoder", "transcoder.kernels": "kernels", sources: "csrc"},
)
