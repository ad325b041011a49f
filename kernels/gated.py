# SPDX-License-Identifier: Apache-2.0
"""What gated units share: two inputs alike, elementwise, in blocks of a flat array."""

from collections.abc import Mapping
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import batched_first, check_floating, check_shape

BLOCK: Final = 1024
NUM_WARPS: Final = 4


def check_gated(name: str, gate: Tensor, up: Tensor) -> None:
    """Raise unless gate and up are floating tensors of one shape and dtype.

    Raises:
      TypeError: No floating tensor, or two dtypes.
      ValueError: Two shapes.
    """
    check_floating(name, gate=gate, up=up)
    check_shape(name, "up", up, tuple(gate.shape))
    if gate.dtype != up.dtype:
        raise TypeError(
            f"{name}: up is {up.dtype}, expected {gate.dtype} as gate; use "
            "up.to(gate.dtype)"
        )


def elementwise(
    kernel: Any, inputs: tuple[Tensor, ...], num_outputs: int, **constants: Any
) -> tuple[Tensor, ...]:
    """Launch a kernel of ``(*inputs, *outputs, numel, ...)`` over a flat array.

    Args:
      kernel: The ``@triton.jit`` function.
      inputs: Tensors of one shape and dtype, with any strides.
      num_outputs: How many results like the inputs it writes.
      **constants: Further constants of the kernel.

    Returns:
      The results, contiguous.
    """
    inputs = tuple(x.contiguous() for x in inputs)
    outputs = tuple(dense_like(inputs[0]) for _ in range(num_outputs))
    numel = inputs[0].numel()
    if numel == 0:
        return outputs
    wide = tl.float64 if inputs[0].dtype == torch.float64 else tl.float32
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    kernel[(triton.cdiv(numel, BLOCK),)](
        *inputs, *outputs, numel, WIDE=wide, BLOCK=BLOCK, **constants, **options
    )
    return outputs


def dense_like(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the shape of ``x``, whatever its strides."""
    return x.new_empty(x.shape)


def mapped(info: Any, in_dims: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """The arguments of a ``vmap`` rule, each tensor with the mapped dim first."""
    return [
        batched_first(x, dim, info.batch_size)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def configurations(
    name: str,
    kernel: Any,
    pointers: tuple[str, ...],
    constants: Mapping[str, Any],
) -> tuple[Configuration, ...]:
    """The specialisations of one kernel, for bfloat16 and float32.

    Args:
      name: ``"<function>/<kernel>"``.
      kernel: The ``@triton.jit`` function.
      pointers: Names of its pointers.
      constants: Its constants, but for WIDE and BLOCK.
    """
    shared = {"WIDE": tl.float32, "BLOCK": BLOCK} | dict(constants)
    return tuple(
        Configuration(
            f"{name}/{pointer(dtype)[1:]}",
            kernel,
            dict.fromkeys(pointers, pointer(dtype)) | {"numel": "i64"},
            shared,
            NUM_WARPS,
            divisible=("numel",),
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
