# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they would use.

``python -m zfunc.kernels.compile_only [prefix ...] [--architectures 80,90,100]`` prints
a JSON line per configuration and architecture. The exit code is 3 if one of them has
violations.

Occupancy, as NVIDIA's calculator counts it: a program of w warps with R registers a
thread takes ``256 * ceil(32 R / 256)`` registers per warp, and a multiprocessor with
65536 of them holds that many warps, rounded down to a multiple of 4. It takes its
shared memory and 1 KiB in units of 128 bytes. The programs of a multiprocessor are the
least of what registers, shared memory, 64 warps and 32 programs allow; the occupancy is
their warps over 64.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configuration import Configuration
from .library import interpreting

_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.(v2|v4|v8))?\.[bfsu](\d+)\b")
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32
_RESERVED_BYTES: Final = 1024
_FAILED: Final = 3


class Limits(NamedTuple):
    """The shared memory of an architecture.

    Attributes:
      shared_bytes: Of a multiprocessor.
      program_bytes: The most that one program can have.
    """

    shared_bytes: int
    program_bytes: int


ARCHITECTURES: Final = MappingProxyType(
    {
        80: Limits(164 * 1024, 163 * 1024),
        90: Limits(228 * 1024, 227 * 1024),
        100: Limits(228 * 1024, 227 * 1024),
    }
)


class Resources(NamedTuple):
    """What one specialisation uses on one architecture.

    Attributes:
      registers: 32-bit registers per thread.
      stack_bytes: Spilled registers and local arrays, per thread.
      local_bytes: Local memory per thread.
      shared_bytes: Shared memory per program.
      wide: Global loads and stores of 16 bytes or more per thread.
      narrow: Those of less.
      num_warps: Warps of a program.
      architecture: 80, 90 or 100.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    wide: int
    narrow: int
    num_warps: int
    architecture: int

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor holds at once.

        Examples:
          >>> Resources(54, 0, 0, 0, 14, 0, 4, 90).programs
          9
        """
        per_warp = 256 * -(-32 * max(self.registers, 1) // 256)
        warps = _REGISTERS // per_warp // 4 * 4
        per_program = 128 * -(-(self.shared_bytes + _RESERVED_BYTES) // 128)
        return min(
            warps // self.num_warps,
            ARCHITECTURES[self.architecture].shared_bytes // per_program,
            _WARPS // self.num_warps,
            _PROGRAMS,
        )

    @property
    def occupancy(self) -> float:
        """The fraction of a multiprocessor's warps that run at once.

        Examples:
          >>> Resources(54, 0, 0, 0, 14, 0, 4, 90).occupancy
          0.5625
        """
        return self.programs * self.num_warps / _WARPS


class Row(NamedTuple):
    """A line of the report: a configuration on an architecture.

    Attributes:
      name: Of the configuration.
      resources: What it uses.
      violations: What the gate says; nothing where it passes.
    """

    name: str
    resources: Resources
    violations: tuple[str, ...]


def compiled(configuration: Configuration, architecture: int) -> Resources:
    """Compile for ``sm_<architecture>`` and read the resources from the cubin.

    Args:
      configuration: What is compiled.
      architecture: 80, 90 or 100.

    Raises:
      ValueError: Another architecture.
      RuntimeError: The interpreter is on, or Triton came without NVIDIA's tools.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise ValueError(
            f"compile_only: architecture is {architecture}, expected one of {known}"
        )
    if interpreting():
        raise RuntimeError(
            "compile_only: TRITON_INTERPRET is on, expected kernels that compile; "
            "start Python with TRITON_INTERPRET=0"
        )
    tool = _tool()
    options = {
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
        "enable_fp_fusion": configuration.fp_fusion,
        "maxnreg": configuration.max_registers,
    }
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(_source(configuration), target=target, options=options)
    widths = access_bytes(binary.asm["ptx"])
    wide = sum(width >= 16 for width in widths)
    return Resources(
        *_usage(tool, binary.asm["cubin"]),
        binary.metadata.shared,
        wide,
        len(widths) - wide,
        configuration.num_warps,
        architecture,
    )


def _source(configuration: Configuration) -> Any:
    names = list(configuration.kernel.arg_names)
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in configuration.signature.items()
        if str(kind)[0] == "*" or name in configuration.divisible
    }
    signature = {name: configuration.signature.get(name, "constexpr") for name in names}
    constants = dict(configuration.constants)
    return ASTSource(configuration.kernel, signature, constants, aligned)


def access_bytes(ptx: str) -> list[int]:
    """The bytes that a thread moves in each global load and store of a program.

    Args:
      ptx: Its text.

    Examples:
      >>> access_bytes("ld.global.v4.b32 {%r1, %r2}; @%p1 st.global.b16 [ %rd3 + 0 ];")
      [16, 2]
    """
    return [
        int(bits) // 8 * int((vector or "v1")[1:])
        for _, vector, bits in _ACCESS.findall(ptx)
    ]


def _tool() -> Path:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        raise RuntimeError(
            f"compile_only: there is no {tool.name} in {tool.parent}, expected the one "
            "of Triton's Linux wheel; type pip install --force-reinstall triton"
        )
    return tool


def _usage(tool: Path, cubin: bytes) -> tuple[int, int, int]:
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


def violations(configuration: Configuration, resources: Resources) -> list[str]:
    """What a shipped configuration must not have; nothing if it passes.

    Args:
      configuration: What was compiled; its ``narrow`` is what it may have.
      resources: What it uses.
    """
    limit = ARCHITECTURES[resources.architecture].program_bytes
    narrow = configuration.narrow
    checks = (
        (resources.stack_bytes == 0, f"stack is {resources.stack_bytes} B, expected 0"),
        (resources.local_bytes == 0, f"local is {resources.local_bytes} B, expected 0"),
        (
            resources.narrow <= narrow,
            f"{resources.narrow} global accesses are narrower than 16 bytes, expected "
            f"{narrow} at most",
        ),
        (
            resources.wide > 0 or not configuration.streams,
            "no global access has 16 bytes, expected streams",
        ),
        (
            resources.shared_bytes <= limit,
            f"shared memory is {resources.shared_bytes} B, expected {limit} at most",
        ),
        (resources.programs > 0, "a multiprocessor cannot hold a program"),
    )
    return [said for passes, said in checks if not passes]


def shipped() -> Iterator[Configuration]:
    """Every configuration of every kernel in this package."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        module: Any = importlib.import_module(f"{__package__}.{info.name}")
        yield from getattr(module, "CONFIGURATIONS", ())


def report(
    prefixes: Sequence[str] = (),
    architectures: Iterable[int] = (90,),
    jobs: int = 2,
    module: str = __name__,
) -> list[Row]:
    """Compile in processes of their own, which works beside the interpreter too.

    Args:
      prefixes: What the names of configurations begin with; all if there is none.
      architectures: Of ``ARCHITECTURES``.
      jobs: How many processes.
      module: What they run, for tests.

    Returns:
      The rows by name and architecture, in the order of ``shipped``.

    Raises:
      RuntimeError: A process failed; the message is what it said.
    """
    words = [sys.executable, "-m", module, *prefixes]
    words.append(f"--architectures={','.join(map(str, architectures))}")
    started = [
        subprocess.Popen(
            [*words, f"--share={share}/{jobs}"],
            env={**os.environ, "TRITON_INTERPRET": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in range(jobs)
    ]
    ended = [process.communicate() for process in started]
    lines = []
    for process, (out, errors) in zip(started, ended, strict=True):
        lines += [json.loads(line) for line in out.splitlines()]
        if process.returncode not in (0, _FAILED):
            raise RuntimeError(f"compile_only: a compilation failed:\n{errors}")
    lines.sort(key=lambda line: line["place"])
    return [
        Row(line["name"], Resources(**line["resources"]), tuple(line["violations"]))
        for line in lines
    ]


def main(words: Sequence[str], found: Iterable[Configuration]) -> int:
    """Print a line for each configuration and architecture.

    Args:
      words: The arguments of the command.
      found: The configurations.

    Returns:
      The exit code: 3 if there are violations (1 is that of an exception).
    """
    parser = argparse.ArgumentParser("compile_only")
    parser.add_argument("prefixes", nargs="*", help="of names; all without one")
    parser.add_argument("--architectures", default="90", help="as 80,90,100")
    parser.add_argument("--share", default="0/1", help="which part of how many")
    options = parser.parse_args(words)
    share, of = map(int, options.share.split("/"))
    prefixes = tuple(options.prefixes) or ("",)
    wanted = [one for one in found if one.name.startswith(prefixes)]
    known = {str(architecture) for architecture in ARCHITECTURES}
    if not wanted:
        parser.error(f"nothing that ships begins with {' or '.join(prefixes)}")
    if not known >= set(options.architectures.split(",")):
        parser.error(
            f"--architectures is {options.architectures}, expected some of "
            f"{','.join(map(str, ARCHITECTURES))}"
        )
    architectures = [int(word) for word in options.architectures.split(",")]
    code = 0
    for place, (one, architecture) in enumerate(product(wanted, architectures)):
        if place % of != share:
            continue
        begun_s = time.perf_counter()
        resources = compiled(one, architecture)
        wrong = violations(one, resources)
        code = _FAILED if wrong else code
        line = {
            "place": place,
            "name": one.name,
            "resources": resources._asdict(),
            "programs": resources.programs,
            "occupancy": resources.occupancy,
            "violations": wrong,
            "seconds": round(time.perf_counter() - begun_s, 2),
        }
        print(json.dumps(line), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], shipped()))
