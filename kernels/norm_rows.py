# SPDX-License-Identifier: Apache-2.0
"""How RMSNorm and LayerNorm launch their kernels.

The forward keeps a row in registers, several rows per program where they are short,
and reads it twice, in chunks, where it has more than ``FORWARD_COLUMNS`` columns. The
backward sums the gradients of scale and bias over the rows of a program in registers,
writes a partial sum per program, and a second kernel adds these up in a fixed order.
Rows of more than ``BACKWARD_COLUMNS`` are split among programs: two, each of which sums
up the whole row, or many, which read the two means of a row from a kernel before. The
number of programs follows from shapes alone, so the bits are the same on every device.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import norm_backward, norm_forward
from .library import (
    batched_first,
    check_columns,
    check_floating,
    check_shape,
    compute_dtype,
)

# The longest rows that a program holds in the forward, and what it reads at once of
# longer ones.
FORWARD_COLUMNS: Final = 32768
CHUNK: Final = 8192
# The same in the backward, and the segments that programs share longer rows by.
BACKWARD_COLUMNS: Final = 8192
SEGMENT: Final = 2048
# Elements that a program holds where several rows fit: forward, backward.
FORWARD_TILE: Final = 4096
BACKWARD_TILE: Final = 2048
# Warps of the backward: 16 on each of the 132 multiprocessors of an H100.
WARPS: Final = 2112
# Bytes of a tile that a program of the backward can hold twice.
AHEAD_BYTES: Final = 16384
# Columns of a program that adds partial sums up, and how many it reads at once.
SUM_COLUMNS: Final = 32
SUM_ROWS: Final = 64


class Tile(NamedTuple):
    """Rows and columns of what a program holds, and its warps."""

    rows: int
    columns: int
    num_warps: int


def forward_tile(columns: int) -> Tile:
    """What a program of the forward holds of rows of this length.

    Examples:
      >>> forward_tile(1000)
      Tile(rows=4, columns=1024, num_warps=8)
      >>> forward_tile(16384)
      Tile(rows=1, columns=16384, num_warps=32)
    """
    block = _power_of_two(columns)
    if block <= FORWARD_TILE:
        return Tile(min(FORWARD_TILE // block, 64), block, 8)
    return Tile(1, block, 32 if block > 8192 else 16)


def forward_columns(itemsize: int, centred: bool) -> int:
    """The longest row that a program of the forward holds whole."""
    return FORWARD_COLUMNS // (1 + (centred and itemsize > 2))


def forward_registers(block: int) -> int | None:
    """What a thread of the forward may have, where ptxas alone takes too few."""
    return 64 if FORWARD_TILE < block < FORWARD_COLUMNS else None


def segment_registers(itemsize: int, centred: bool) -> int | None:
    """What a thread of ``backward_segments`` may have, likewise."""
    return 64 if itemsize > 2 and centred else None


def slope_registers(itemsize: int, centred: bool) -> int | None:
    """What a thread of ``slopes`` may have, likewise."""
    return (80 if centred else 64) if itemsize == 2 else None


def backward_tile(columns: int, itemsize: int) -> Tile:
    """What a program of the backward holds of rows of this length.

    A row of 16-bit elements may be two tiles; longer ones, and float32, which would
    not fit into registers, are shared out by small segments.

    Examples:
      >>> backward_tile(1000, 2)
      Tile(rows=2, columns=1024, num_warps=4)
      >>> backward_tile(16384, 2)
      Tile(rows=1, columns=8192, num_warps=16)
      >>> backward_tile(16384, 4)
      Tile(rows=1, columns=2048, num_warps=8)
    """
    narrow = itemsize == 2
    if columns > BACKWARD_COLUMNS * (1 + narrow):
        return Tile(1, SEGMENT, 8)
    block = min(_power_of_two(columns), BACKWARD_COLUMNS)
    warps = 4 if narrow else 8
    if block <= BACKWARD_TILE:
        return Tile(min(BACKWARD_TILE // block, 64), block, warps)
    return Tile(1, block, warps * (4 if block > 4096 else 2))


def _power_of_two(columns: int) -> int:
    return 1 << (columns - 1).bit_length()


def forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The results of ``forward_like``, computed."""
    y, total, mean, rstd = results = forward_like(x, residual, centred)
    if y.numel() == 0:
        return results
    tensors = (
        x.contiguous(),
        _dense(residual),
        _dense(scale),
        _dense(bias),
        y,
        None if residual is None else total,
        mean,
        rstd,
    )
    rows, columns, wide = rstd.numel(), x.shape[-1], _wide(rstd)
    if columns > forward_columns(x.itemsize, centred):
        norm_forward.forward_chunks[(rows,)](
            *tensors, columns, eps, wide, CHUNK, num_warps=16, enable_fp_fusion=True
        )
        return results
    held, block, num_warps = forward_tile(columns)
    norm_forward.forward_rows[(-(-rows // held),)](
        *tensors,
        rows,
        columns,
        eps,
        wide,
        held,
        block,
        num_warps=num_warps,
        enable_fp_fusion=True,
        maxnreg=forward_registers(block),
    )
    return results


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _wide(rstd: Tensor) -> Any:
    return tl.float64 if rstd.dtype == torch.float64 else tl.float32


def forward_like(
    x: Tensor, residual: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Empty results: y, the sum with a residual, the means and 1 / std of rows.

    A sum that nobody asked for has no elements; means are None.
    """
    lead = x.shape[:-1]
    wide = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty((*lead, 0) if residual is None else x.shape),
        x.new_empty(lead, dtype=wide) if centred else None,
        x.new_empty(lead, dtype=wide),
    )


def backward(
    grad: Tensor,
    total_grad: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    groups: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The results of ``backward_like``, computed; ``bias`` gives a dtype."""
    centred = mean is not None
    x_grad, scale_grad, bias_grad = results = backward_like(
        x, scale, bias, groups, centred
    )
    if x.numel() == 0:
        for grad in results[1 : 2 + centred]:
            grad.zero_()
        return results
    count, columns = math.prod(groups), x.shape[-1]
    rows = rstd.numel() // count
    tile = backward_tile(columns, x.itemsize)
    segments = -(-columns // tile.columns)
    most = WARPS // (min(tile.num_warps, 16) * count * segments)
    programs = min(-(-rows // tile.rows), max(1, most))
    shape = count, programs, columns
    scale_sums = None if scale is None else rstd.new_empty(shape)
    bias_sums = None if bias is None else rstd.new_empty(shape)
    launch = _backward_rows if segments == 1 else _backward_segments
    launch(
        (grad.contiguous(), _dense(total_grad)),
        (x.contiguous(), _dense(mean), rstd.contiguous(), _dense(scale)),
        (x_grad, scale_sums, bias_sums),
        (count, rows, columns, programs),
        tile,
    )
    if scale is not None or bias is not None:
        norm_backward.add_up[(count * -(-columns // SUM_COLUMNS),)](
            scale_sums,
            bias_sums,
            scale_grad,
            bias_grad,
            programs,
            columns,
            SUM_ROWS,
            SUM_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return results


def _backward_rows(grads: Any, saved: Any, outs: Any, counts: Any, tile: Tile) -> None:
    count, rows, columns, programs = counts
    norm_backward.backward_rows[(count * programs,)](
        *grads,
        *saved,
        *outs,
        rows,
        columns,
        programs,
        ahead(tile, grads[0].itemsize, None not in (grads[1], saved[1])),
        _wide(saved[2]),
        tile.rows,
        tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def ahead(tile: Tile, itemsize: int, crowded: bool) -> bool:
    """Whether a program of the backward has room for the next tile, too.

    Not for a long one where it is ``crowded``: with means and a residual's cotangent.
    """
    size_bytes = tile.rows * tile.columns * itemsize
    return size_bytes <= AHEAD_BYTES // (1 + crowded)


def _backward_segments(
    grads: Any, saved: Any, outs: Any, counts: Any, tile: Tile
) -> None:
    count, rows, columns, programs = counts
    segments = -(-columns // tile.columns)
    _, mean, rstd, _ = saved
    slope = shift = None
    if segments > 2:
        slope = torch.empty_like(rstd)
        shift = None if mean is None else torch.empty_like(rstd)
        norm_backward.slopes[(count * rows,)](
            grads[0],
            *saved,
            slope,
            shift,
            columns,
            _wide(rstd),
            CHUNK,
            num_warps=16,
            enable_fp_fusion=True,
            maxnreg=slope_registers(grads[0].itemsize, mean is not None),
        )
    norm_backward.backward_segments[(count * programs * segments,)](
        *grads,
        *saved,
        slope,
        shift,
        *outs,
        rows,
        columns,
        programs,
        segments,
        _wide(rstd),
        tile.columns,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
        maxnreg=segment_registers(grads[0].itemsize, mean is not None),
    )


def backward_like(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    groups: Sequence[int],
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Empty results: the gradients of x, scale and bias, the last two per group.

    Groups are the leading dims of x whose gradients are not added up. A parameter that
    is None has a gradient without elements, and RMSNorm's bias none.
    """

    def like(parameter: Tensor | None) -> Tensor:
        if parameter is None:
            return x.new_empty((*groups, 0))
        return parameter.new_empty((*groups, x.shape[-1]))

    return x.new_empty(x.shape), like(scale), like(bias) if centred else None


def rows_first(info: Any, in_dims: Any, tensors: Any) -> list[Any]:
    """Arguments of a mapped call with the mapped dim first among the rows."""
    return [
        batched_first(x, dim, info.batch_size)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def check(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """Raise unless these are arguments of a norm.

    Raises:
      TypeError: An argument that is no floating tensor of 16 bits at least, residual of
        another dtype than x; an eps that is not a number.
      ValueError: A scale, bias or residual of another shape; a negative eps.
    """
    check_floating(name, x=x, residual=residual, scale=scale, bias=bias)
    if x.ndim == 0:
        raise ValueError(f"{name}: x has shape (), expected [..., D]; use x[None]")
    check_columns(name, "x", x)
    for argument, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None:
            check_shape(name, argument, tensor, (x.shape[-1],))
    if residual is not None:
        check_shape(name, "residual", residual, tuple(x.shape))
        if residual.dtype != x.dtype:
            raise TypeError(
                f"{name}: residual is {residual.dtype}, expected {x.dtype} as x; use "
                "residual.to(x.dtype)"
            )
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(
            f"{name}: eps is {type(eps).__name__}, expected a number; use float(eps)"
        )
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{name}: eps is {eps}, expected a number >= 0, such as 1e-6")
