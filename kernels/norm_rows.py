# SPDX-License-Identifier: Apache-2.0
"""How the kernels of ``norm_kernels`` are launched, for RMSNorm and LayerNorm.

The forward keeps a row in registers, several rows per program where they are short,
and reads it twice, in chunks, where it has more than ``FORWARD_COLUMNS`` columns. The
backward sums the gradients of scale and bias over the rows of a program in registers,
writes a partial sum per program, and a second kernel adds these up in a fixed order.
Rows of more than ``BACKWARD_COLUMNS`` are split among programs, which read the two
means of a row from a kernel before. The number of programs follows from shapes alone,
so the bits are the same on every device.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import norm_kernels as kernels
from .configuration import Configuration, pointer
from .library import batched_first, check_floating, check_shape, compute_dtype

# Programs of the backward: two for each of the 132 multiprocessors of an H100.
PROGRAMS: Final = 264
# Elements that a program holds where several rows fit.
TILE: Final = 4096
# The longest rows that a program holds.
FORWARD_COLUMNS: Final = 32768
BACKWARD_COLUMNS: Final = 8192
# Columns of a longer row that a program reads at once.
CHUNK: Final = 8192
# Columns of a program that adds partial sums up, and how many it reads at once.
SUM_COLUMNS: Final = 32
SUM_ROWS: Final = 64
DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """Rows and columns of what a program holds, and its warps."""

    rows: int
    columns: int
    num_warps: int


def tile(columns: int) -> Tile:
    """What a program holds of rows of this length.

    Examples:
      >>> tile(1000)
      Tile(rows=4, columns=1024, num_warps=8)
      >>> tile(16384)
      Tile(rows=1, columns=16384, num_warps=16)
    """
    block = 1 << (columns - 1).bit_length()
    if block <= TILE:
        return Tile(min(TILE // block, 64), block, 8)
    return Tile(1, block, 32 if block > 16384 else 16)


def forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        mean if centred else None,
        rstd,
    )
    rows, columns, wide = rstd.numel(), x.shape[-1], _wide(rstd)
    if columns > FORWARD_COLUMNS:
        kernels.forward_chunks[(rows,)](
            *tensors, columns, eps, wide, CHUNK, num_warps=16, enable_fp_fusion=True
        )
        return results
    held, block, num_warps = tile(columns)
    kernels.forward_rows[(-(-rows // held),)](
        *tensors,
        rows,
        columns,
        eps,
        wide,
        held,
        block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return results


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _wide(rstd: Tensor) -> Any:
    return tl.float64 if rstd.dtype == torch.float64 else tl.float32


def forward_like(
    x: Tensor, residual: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results: y, the sum with a residual, the means and 1 / std of rows.

    A sum or means that nobody asked for have no elements.
    """
    lead = x.shape[:-1]
    wide = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty((*lead, 0) if residual is None else x.shape),
        x.new_empty(lead if centred else (*lead, 0), dtype=wide),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``backward_like``, computed; ``bias`` gives a dtype."""
    results = backward_like(x, scale, bias, groups)
    x_grad, scale_grad, bias_grad = results
    if x.numel() == 0:
        return x_grad, scale_grad.zero_(), bias_grad.zero_()
    count, columns = math.prod(groups), x.shape[-1]
    rows = rstd.numel() // count
    held, block, _ = tile(min(columns, BACKWARD_COLUMNS))
    segments = -(-columns // block)
    programs = min(-(-rows // held), max(1, PROGRAMS // (count * segments)))
    shape = count, programs, columns
    scale_sums = None if scale is None else rstd.new_empty(shape)
    bias_sums = None if bias is None else rstd.new_empty(shape)
    launch = _backward_rows if segments == 1 else _backward_segments
    launch(
        (grad.contiguous(), _dense(total_grad)),
        (x.contiguous(), _dense(mean), rstd.contiguous(), _dense(scale)),
        (x_grad, scale_sums, bias_sums),
        (count, rows, columns, programs),
    )
    if scale is not None or bias is not None:
        kernels.add_up[(count * -(-columns // SUM_COLUMNS),)](
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


def _backward_rows(grads: Any, saved: Any, outs: Any, counts: Any) -> None:
    count, rows, columns, programs = counts
    held, block, num_warps = tile(columns)
    kernels.backward_rows[(count * programs,)](
        *grads,
        *saved,
        *outs,
        rows,
        columns,
        programs,
        _wide(saved[2]),
        held,
        block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def _backward_segments(grads: Any, saved: Any, outs: Any, counts: Any) -> None:
    count, rows, columns, programs = counts
    _, block, num_warps = tile(BACKWARD_COLUMNS)
    segments = -(-columns // block)
    _, mean, rstd, _ = saved
    wide = _wide(rstd)
    slope = torch.empty_like(rstd)
    shift = None if mean is None else torch.empty_like(rstd)
    kernels.slopes[(count * rows,)](
        grads[0],
        *saved,
        slope,
        shift,
        columns,
        wide,
        block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    kernels.backward_segments[(count * programs * segments,)](
        *grads,
        *saved,
        slope,
        shift,
        *outs,
        rows,
        columns,
        programs,
        segments,
        wide,
        block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def backward_like(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, groups: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results: the gradients of x, scale and bias, the last two per group.

    Groups are the leading dims of x whose gradients are not added up; what is None has
    a gradient without elements.
    """
    columns = x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty((*groups, 0))
        if scale is None
        else scale.new_empty((*groups, columns)),
        x.new_empty((*groups, 0))
        if bias is None
        else bias.new_empty((*groups, columns)),
    )


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
      TypeError: An argument that is not a tensor of one of ``DTYPES``, or a residual of
        another dtype than x; an eps that is not a number.
      ValueError: A scale, bias or residual of another shape; a negative eps.
    """
    check_floating(name, x=x, residual=residual, scale=scale, bias=bias)
    if x.ndim == 0:
        raise ValueError(f"{name}: x has shape (), expected [..., D]; use x[None]")
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
    for argument, tensor in (("x", x), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: {argument} is {tensor.dtype}, expected one of "
                f"{', '.join(map(str, DTYPES))}; use {argument}.to(torch.bfloat16)"
            )
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(
            f"{name}: eps is {type(eps).__name__}, expected a number; use float(eps)"
        )
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"{name}: eps is {eps}, expected a number >= 0, such as 1e-6")


def configurations(name: str, centred: bool) -> tuple[Configuration, ...]:
    """What a norm ships as, for each width: forward, backward and the last sum."""
    return tuple(
        configuration
        for dtype in (torch.bfloat16, torch.float32)
        for columns in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
        for residual in (False, True)
        for configuration in _shipped(name, centred, residual, dtype, columns)
    )


def _shipped(
    name: str, centred: bool, residual: bool, dtype: torch.dtype, columns: int
) -> Iterator[Configuration]:
    x, wide = pointer(dtype), {"WIDE": tl.float32}
    suffix = f"{x[1:]}/{columns}" + "/residual" * residual
    held, block, num_warps = tile(columns)
    whole = columns <= FORWARD_COLUMNS
    yield _configuration(
        f"{name}/forward/{suffix}",
        kernels.forward_rows if whole else kernels.forward_chunks,
        {"x_ptr": x, "y_ptr": x}
        | dict.fromkeys(("residual_ptr", "total_ptr"), x if residual else None)
        | dict.fromkeys(("mean_ptr", "bias_ptr"), "*fp32" if centred else None),
        wide | {"EPS": 1e-6, "ROWS": held, "BLOCK": block if whole else CHUNK},
        num_warps if whole else 16,
        narrow=1 + centred,
    )
    held, block, num_warps = tile(min(columns, BACKWARD_COLUMNS))
    constants = wide | {"ROWS": held, "BLOCK": block}
    pointers = {"grad_ptr": x, "x_ptr": x, "x_grad_ptr": x}
    pointers |= {"total_grad_ptr": x if residual else None}
    centres = "mean_ptr", "bias_sums_ptr", "shift_ptr"
    pointers |= dict.fromkeys(centres, "*fp32" if centred else None)
    whole = columns <= BACKWARD_COLUMNS
    yield _configuration(
        f"{name}/backward/{suffix}",
        kernels.backward_rows if whole else kernels.backward_segments,
        pointers,
        constants,
        num_warps,
        narrow=8,
    )
    if not whole and not residual:
        yield _configuration(
            f"{name}/slopes/{suffix}",
            kernels.slopes,
            pointers,
            constants,
            num_warps,
            narrow=4,
        )
    if not residual:
        yield _configuration(
            f"{name}/sum/{suffix}",
            kernels.add_up,
            dict.fromkeys(
                ("bias_sums_ptr", "bias_grad_ptr"), "*fp32" if centred else None
            )
            | {"scale_grad_ptr": "*fp32"},
            {"ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS},
            4,
            narrow=1 + centred,
        )


def _configuration(
    name: str,
    kernel: Any,
    pointers: Mapping[str, str | None],
    constants: Mapping[str, Any],
    num_warps: int,
    narrow: int = 0,
) -> Configuration:
    """With a float32 scale; what is None, and no parameter elsewhere, is left out."""
    kinds = {
        argument: pointers.get(
            argument, "*fp32" if argument.endswith("_ptr") else "i32"
        )
        for argument in kernel.arg_names
        if argument.islower()
    }
    return Configuration(
        name,
        kernel,
        {argument: kind for argument, kind in kinds.items() if kind is not None},
        {argument: None for argument, kind in kinds.items() if kind is None}
        | {k: v for k, v in constants.items() if k in kernel.arg_names},
        num_warps,
        divisible=("columns",),
        narrow=narrow,
    )
