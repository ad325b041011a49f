# SPDX-License-Identifier: Apache-2.0
"""What a kernel ships as: the specialisations that a compile-only check compiles."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

# How Triton names the types of pointers to a dtype.
_NAMES: Final = MappingProxyType(
    {
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.int64: "i64",
        torch.int32: "i32",
        torch.bool: "i1",
    }
)


def pointer(dtype: torch.dtype) -> str:
    """Triton's name of the type of a pointer to a dtype.

    Examples:
      >>> pointer(torch.bfloat16)
      '*bf16'
    """
    return f"*{_NAMES[dtype]}"


@dataclass(frozen=True)
class Configuration:
    """One specialisation of one kernel.

    Attributes:
      name: ``"<function>/<kernel>/<dtype>/<size>"``, unique.
      kernel: The ``@triton.jit`` function.
      signature: For each parameter that is no constant Triton's type: ``"*bf16"``,
        ``"i32"``, ``"fp32"``, a tuple of these for a tuple. Pointers count as aligned
        to 16 bytes, and the integers in ``divisible`` as multiples of 16.
      constants: The values of the ``tl.constexpr`` parameters (and of pointers that are
        None).
      num_warps: Warps of a program.
      num_stages: Stages of its software pipeline.
      fp_fusion: Whether products and sums may be fused (``enable_fp_fusion``).
      divisible: Integer parameters that are multiples of 16 in this specialisation.
      max_registers: What a thread may have, ``maxnreg``; None leaves it to ptxas, which
        may then spill for one more program on a multiprocessor.
      streams: Whether there is a tensor that is read or written by 16 bytes at a time.
      narrow: How many global loads and stores of the PTX may be narrower than 16 bytes:
        those of scalars and indices, once per program or row, not of streams.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    fp_fusion: bool = True
    divisible: tuple[str, ...] = ()
    narrow: int = 0
    max_registers: int | None = None
    streams: bool = True
