# SPDX-License-Identifier: Apache-2.0
"""Kernels over [groups, rows, columns] with a vector per group, and its gradient.

A bias belongs to the columns; there is one for each group, and one group, but under
``vmap``. Its gradient is a sum over rows: each program adds up some of them, in float32
at least, and a second kernel adds what they leave, in a fixed order, without atomics.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import batched_first, check_shape, compute_dtype

BLOCK: Final = 1024  # elements of a tile
WIDTHS: Final = (16, 128, 1024)  # its columns: a kernel for narrow rows, and two more
NUM_WARPS: Final = 4
PROGRAMS: Final = 1024  # of a reduction, as far as its columns allow
FINISH_COLUMNS: Final = 64
FINISH_PARTS: Final = 16


class Tiles(NamedTuple):
    """How programs share a tensor: tiles of so many rows and columns.

    Attributes:
      rows: Rows of a tile.
      columns: Its columns.
      parts: Programs that share the rows of a group in a reduction.
      span: Rows of each.
    """

    rows: int
    columns: int
    parts: int
    span: int

    @classmethod
    def of(cls, groups: int, rows: int, columns: int) -> "Tiles":
        """By the shape alone, so equal inputs are added up in equal order."""
        wide = next((w for w in WIDTHS if w >= columns), WIDTHS[-1])
        high = BLOCK // wide
        across = groups * triton.cdiv(columns, wide)
        parts = max(1, min(PROGRAMS // max(1, across), triton.cdiv(rows, high)))
        span = triton.cdiv(triton.cdiv(rows, parts), high) * high
        return cls(high, wide, triton.cdiv(rows, max(1, span)), span)

    def partial(self, x: Tensor) -> Tensor:
        """Room for the sums that the programs leave: [groups, parts, columns]."""
        shape = x.shape[0], self.parts, x.shape[2]
        return x.new_empty(shape, dtype=compute_dtype(x.dtype))


def launch(
    kernel: Any,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    tiles: Tiles,
    span: int,
    **arguments: Any,
) -> None:
    """Launch a kernel of ``(*inputs, *outputs, rows, columns, span, ...)``.

    Args:
      kernel: The ``@triton.jit`` function; products and sums are not fused in it.
      inputs: Tensors with any strides, or None.
      outputs: The first is [groups, rows, columns], with an element at least.
      tiles: How programs share it.
      span: Rows of a program.
      **arguments: The kernel's further arguments.
    """
    groups, rows, columns = outputs[0].shape
    across = triton.cdiv(columns, tiles.columns)
    kernel[(groups * triton.cdiv(rows, span) * across,)](
        *(None if x is None else x.contiguous() for x in inputs),
        *outputs,
        rows,
        columns,
        span,
        WIDE=wide(outputs[0].dtype),
        ROWS=tiles.rows,
        COLS=tiles.columns,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
        **arguments,
    )


@triton.jit
def place(rows, columns, span, COLS: tl.constexpr):
    """Of this program: group, number of its span, where its rows begin, end, columns.

    Programs go through columns first, then through the spans of all groups.
    """
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, COLS)
    down = tl.cdiv(rows, span)
    col = program % across * COLS + tl.arange(0, COLS)
    part = program // across
    begin = part % down * span
    return part // down, part, begin, tl.minimum(begin + span, rows), col


@triton.jit
def _finish_kernel(
    partial_ptr,
    out_ptr,
    parts,
    columns,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(columns, COLS)
    col = program % across * COLS + tl.arange(0, COLS)
    group = program // across
    begin = group * 0
    total = tl.zeros([PARTS, COLS], WIDE)
    while begin < parts:
        part = begin + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (col < columns)[None, :]
        at = (group * parts + part)[:, None] * columns + col[None, :]
        total += tl.load(partial_ptr + at, inside, 0.0)
        begin += PARTS
    out = tl.sum(total, 0)
    at = group * columns + col
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), col < columns)


def finish(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over parts, rounded to a dtype.

    Args:
      partial: [groups, parts, columns] in float32 or float64, with an element.
      dtype: Of the result, [groups, columns].
    """
    groups, parts, columns = partial.shape
    out = partial.new_empty((groups, columns), dtype=dtype)
    _finish_kernel[(groups * triton.cdiv(columns, FINISH_COLUMNS),)](
        partial,
        out,
        parts,
        columns,
        WIDE=wide(partial.dtype),
        PARTS=FINISH_PARTS,
        COLS=FINISH_COLUMNS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return out


def wide(dtype: torch.dtype) -> tl.dtype:
    """Triton's dtype of arithmetic on stored values."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def check_bias(name: str, x: Tensor, bias: Tensor) -> None:
    """Raise unless a bias is a vector of the last dim of ``x``, and of its dtype.

    Raises:
      ValueError: ``x`` has no dim, or the bias another shape.
      TypeError: Two dtypes.
    """
    if x.dim() == 0:
        raise ValueError(f"{name}: x has shape (), expected [..., D]; use x.reshape(1)")
    check_shape(name, "bias", bias, (x.shape[-1],))
    if bias.dtype != x.dtype:
        raise TypeError(
            f"{name}: bias is {bias.dtype}, expected {x.dtype} as x; use "
            "bias.to(x.dtype)"
        )


def grouped(x: Tensor) -> Tensor:
    """[1, rows, columns] of a tensor of any shape: one group."""
    columns = x.shape[-1] if x.dim() > 0 else 1
    return x.reshape(1, math.prod(x.shape[:-1]), columns)


def merged(info: Any, in_dims: Any, args: tuple[Any, ...]) -> list[Any]:
    """The arguments of a ``vmap`` rule, the mapped dim as one of groups."""
    return [
        batched_first(x, dim, info.batch_size).flatten(0, 1)
        if isinstance(x, Tensor)
        else x
        for x, dim in zip(args, in_dims, strict=True)
    ]


def split(info: Any, x: Tensor) -> Tensor:
    """A result of ``merged`` arguments, with the mapped dim first."""
    return x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size))


def configurations(
    name: str,
    kernel: Any,
    pointers: tuple[str, ...],
    constants: Mapping[str, Any],
    narrow: int,
    others: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Configuration, ...]:
    """The specialisations of a kernel for bfloat16, float32 and every width of tiles.

    Args:
      name: ``"<function>/<kernel>"``.
      kernel: The ``@triton.jit`` function.
      pointers: Names of its pointers to values of the dtype.
      constants: Its constants, but for WIDE and those of the tile.
      narrow: Accesses to vectors of the columns, and to keys, once per program or row.
      others: The types of its other parameters, but for rows, columns and span.
    """
    sizes = dict.fromkeys(("rows", "columns", "span"), "i32") | dict(others)
    return tuple(
        Configuration(
            f"{name}/{pointer(dtype)[1:]}/{columns}",
            kernel,
            dict.fromkeys(pointers, pointer(dtype)) | sizes,
            dict(constants)
            | {"WIDE": tl.float32, "ROWS": BLOCK // columns, "COLS": columns},
            NUM_WARPS,
            fp_fusion=False,
            divisible=("columns",),
            narrow=narrow,
        )
        for dtype in (torch.bfloat16, torch.float32)
        for columns in WIDTHS
    )


CONFIGURATIONS: Final = tuple(
    Configuration(
        f"columns/finish/{pointer(dtype)[1:]}",
        _finish_kernel,
        {"partial_ptr": "*fp32", "out_ptr": pointer(dtype)}
        | {"parts": "i32", "columns": "i32"},
        {"WIDE": tl.float32, "PARTS": FINISH_PARTS, "COLS": FINISH_COLUMNS},
        NUM_WARPS,
        divisible=("columns",),
        narrow=1,
    )
    for dtype in (torch.bfloat16, torch.float32)
)
