# SPDX-License-Identifier: Apache-2.0
"""How a program runs: one backend per file."""

from __future__ import annotations

import importlib.util
from types import MappingProxyType
from typing import Final

import torch

from zfunc.program.backends import aten, cudagraph, inductor
from zfunc.program.program import CompileGraph

BACKENDS: Final = MappingProxyType(
    {
        "aten": aten.compile_graph,
        "inductor": inductor.compile_graph,
        "cudagraph": cudagraph.compile_graph,
    }
)


def choose(name: str | None, device_type: str) -> CompileGraph:
    """The backend of that name; None: aten on a CPU, inductor on a GPU.

    Raises:
      ValueError: there is no such backend, or it cannot run here; the message says
        what to install or to use instead.

    Examples:
      >>> choose("jax", "cpu")
      Traceback (most recent call last):
      ValueError: there is no backend 'jax'; there are aten, inductor, cudagraph
    """
    check_name(name)
    name = name or ("inductor" if device_type == "cuda" else "aten")
    if name == "cudagraph" and device_type != "cuda":
        raise ValueError(
            f"backend='cudagraph' replays on a GPU, this state is on a {device_type}: "
            "use backend='aten' or 'inductor', or make the mesh on a GPU."
        )
    if name != "aten":
        _check_compiler(name, device_type)
    return BACKENDS[name]


def check_name(name: str | None) -> None:
    """Raise for what is not the name of a backend, or None."""
    if name is not None and name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(f"there is no backend {name!r}; there are {known}")


def _check_compiler(name: str, device_type: str) -> None:
    """Inductor writes C++ for the CPU and Triton for a GPU."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"backend={name!r} needs Triton on a GPU: pip install triton, or use "
            "backend='aten'."
        )
    if device_type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            tried = [c for c in torch._inductor.config.cpp.cxx if c]
            raise ValueError(
                f"backend={name!r} needs a C++ compiler on the CPU, and "
                f"{' and '.join(tried)} does not run: install g++ (apt-get install "
                "g++), set CXX to one that there is, or use backend='aten', which "
                "compiles nothing."
            ) from error
