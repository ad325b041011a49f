# SPDX-License-Identifier: Apache-2.0
"""The list of packages; everything else about the build is in pyproject.toml."""

from setuptools import find_packages, setup

kernels = ["zfunc.kernels", *(f"zfunc.kernels.{p}" for p in find_packages("kernels"))]

setup(packages=[*find_packages(include=["zfunc", "zfunc.*"]), *kernels])
