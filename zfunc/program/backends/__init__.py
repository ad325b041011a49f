# SPDX-License-Identifier: Apache-2.0
"""How a program runs: one backend per file."""

from __future__ import annotations

from typing import Any

from zfunc.program.backends import aten
from zfunc.program.program import CompileGraph


def choose(name: Any, device_type: str) -> CompileGraph:
    """The backend of that name; None: the default of the device."""
    return aten.compile_graph
