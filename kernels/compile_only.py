# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they would use.

``python -m zfunc.kernels.compile_only [prefix ...]`` prints a line per configuration.
It must run without ``TRITON_INTERPRET``.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configuration import Configuration

_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.(v2|v4|v8))?\.[bfsu](\d+)\b")


class Resources(NamedTuple):
    """What one specialisation uses on one architecture.

    Attributes:
      registers: 32-bit registers per thread.
      stack_bytes: Spilled registers and local arrays, per thread.
      local_bytes: Local memory per thread.
      shared_bytes: Shared memory per program.
      wide: Global loads and stores of 16 bytes or more per thread.
      narrow: Those of less.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    wide: int
    narrow: int


def compiled(configuration: Configuration, architecture: int) -> Resources:
    """Compile for ``sm_<architecture>`` and read the resources from the cubin."""
    names = list(configuration.kernel.arg_names)
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in configuration.signature.items()
        if kind.startswith("*") or name in configuration.divisible
    }
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        configuration.kernel, signature, dict(configuration.constants), aligned
    )
    options = {
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
        "enable_fp_fusion": configuration.fp_fusion,
    }
    binary = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=options
    )
    widths = [
        int(bits) // 8 * int((vector or "v1")[1:])
        for _, vector, bits in _ACCESS.findall(binary.asm["ptx"])
    ]
    usage = _usage(binary.asm["cubin"])
    wide = sum(width >= 16 for width in widths)
    return Resources(*usage, binary.metadata.shared, wide, len(widths) - wide)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]), int(found["LOCAL"])


def shipped() -> Iterator[Configuration]:
    """Every configuration of every kernel in this package."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        module: Any = importlib.import_module(f"{__package__}.{info.name}")
        yield from getattr(module, "CONFIGURATIONS", ())


if __name__ == "__main__":
    prefixes = tuple(sys.argv[1:]) or ("",)
    for one in shipped():
        if one.name.startswith(prefixes):
            found = compiled(one, 90)
            print(json.dumps({"name": one.name} | found._asdict()))
