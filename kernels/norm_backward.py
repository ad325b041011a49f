# SPDX-License-Identifier: Apache-2.0
r"""The backward kernels of RMSNorm and LayerNorm.

With :math:`\hat x = r \, c` of the forward and :math:`g = \bar y \, s`, where brackets
are LayerNorm's:

.. math::
  \bar x = r \, (g - [\mathrm{mean}(g)] - \hat x \, \mathrm{mean}(g \hat x)), \quad
  \bar s = \sum \bar y \, \hat x, \quad [\bar b = \sum \bar y]

The sums are over the rows of a group: each of its programs adds up its own rows.
What is not there is None: scale, bias, the cotangent of a residual sum, and means.
"""

import triton
import triton.language as tl

from .norm_forward import parameter, stream


@triton.jit
def _tile(grad_ptr, x_ptr, row, end, columns, BLOCK: tl.constexpr):
    """Whole rows of two tensors, in the dtype they have; zeros from ``end`` on."""
    column = tl.arange(0, BLOCK)[None, :]
    at = row * columns + column
    inside = (row < end) & (column < columns)
    return tl.load(grad_ptr + at, inside, 0.0), tl.load(x_ptr + at, inside, 0.0)


@triton.jit
def _share(sums_ptr, at, sums, inside):
    """A program's part of a gradient, if there is such a parameter."""
    if sums_ptr is not None:
        tl.store(sums_ptr + at, sums, inside)


@triton.jit(do_not_specialize=["rows", "programs"])
def backward_rows(
    grad_ptr,
    total_grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    x_grad_ptr,
    scale_sums_ptr,
    bias_sums_ptr,
    rows,
    columns,
    programs,
    AHEAD: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every ``programs``-th tile of a group of rows; its share of the sums.

    With AHEAD the next tile is on its way while this one waits for its sums, as is the
    cotangent of the residual sum where no means take up registers.
    """
    program = tl.program_id(0)
    start = (program // programs).to(tl.int64) * rows
    end = start + rows
    start += program % programs * ROWS
    column = tl.arange(0, BLOCK)[None, :]
    present = column < columns
    if scale_ptr is not None:
        scale = parameter(scale_ptr, column, present, WIDE)
    scale_sums = tl.zeros((ROWS, BLOCK), WIDE)
    bias_sums = tl.zeros((ROWS, BLOCK), WIDE)
    row = start + tl.arange(0, ROWS)[:, None]
    if AHEAD:
        next_grad, next_x = _tile(grad_ptr, x_ptr, row, end, columns, BLOCK)
    while start < end:
        here = start + tl.arange(0, ROWS)
        row = here[:, None]
        at = row * columns + column
        inside = (row < end) & present
        start += programs * ROWS
        if AHEAD:
            grad, x = next_grad, next_x
            ahead = start + tl.arange(0, ROWS)[:, None]
            next_grad, next_x = _tile(grad_ptr, x_ptr, ahead, end, columns, BLOCK)
        else:
            grad, x = _tile(grad_ptr, x_ptr, row, end, columns, BLOCK)
        grad = grad.to(WIDE)
        x = x.to(WIDE)
        if total_grad_ptr is not None and mean_ptr is None:
            total_grad = stream(total_grad_ptr, at, inside, WIDE)
        rstd = tl.load(rstd_ptr + here, here < end, 0.0)[:, None]
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + here, here < end, 0.0)[:, None]
        x *= rstd
        scale_sums += grad * x
        bias_sums += grad
        if scale_ptr is not None:
            grad *= scale
        x_grad = grad - x * (tl.sum(grad * x, 1, keep_dims=True) / columns)
        if mean_ptr is not None:
            x_grad -= tl.sum(grad, 1, keep_dims=True) / columns
        x_grad *= rstd
        if total_grad_ptr is not None:
            if mean_ptr is not None:
                total_grad = stream(total_grad_ptr, at, inside, WIDE)
            x_grad += total_grad
        tl.store(x_grad_ptr + at, x_grad.to(x_grad_ptr.dtype.element_ty), inside)
    column = tl.arange(0, BLOCK)
    at = program.to(tl.int64) * columns + column
    _share(scale_sums_ptr, at, tl.sum(scale_sums, 0), column < columns)
    _share(bias_sums_ptr, at, tl.sum(bias_sums, 0), column < columns)


@triton.jit
def slopes(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    slope_ptr,
    shift_ptr,
    columns,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The two means that the gradient of a row subtracts, one row per program."""
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    rstd = tl.load(rstd_ptr + row)
    slopes = tl.zeros((BLOCK,), WIDE)
    shifts = tl.zeros((BLOCK,), WIDE)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    done = 0
    while done < columns:
        column = done + tl.arange(0, BLOCK)
        inside = column < columns
        grad = stream(grad_ptr + start, column, inside, WIDE)
        x = stream(x_ptr + start, column, inside, WIDE)
        if mean_ptr is not None:
            x -= mean
        if scale_ptr is not None:
            grad *= parameter(scale_ptr, column, inside, WIDE)
        slopes += grad * x
        shifts += grad
        done += BLOCK
    tl.store(slope_ptr + row, tl.sum(slopes, 0) * rstd / columns)
    if mean_ptr is not None:
        tl.store(shift_ptr + row, tl.sum(shifts, 0) / columns)


@triton.jit
def _statistic(ptr, row):
    """Of a row, or 0 where there is none."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + row)
    return value


@triton.jit
def _segment(grad_ptr, x_ptr, mean, scale_ptr, column, present, WIDE: tl.constexpr):
    """Columns of a row: cotangent, centred x, and the cotangent times scale."""
    grad = stream(grad_ptr, column, present, WIDE)
    x = stream(x_ptr, column, present, WIDE) - mean
    g = grad
    if scale_ptr is not None:
        g *= parameter(scale_ptr, column, present, WIDE)
    return grad, x, g


@triton.jit(do_not_specialize=["rows", "programs", "segments"])
def backward_segments(
    grad_ptr,
    total_grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    slope_ptr,
    shift_ptr,
    x_grad_ptr,
    scale_sums_ptr,
    bias_sums_ptr,
    rows,
    columns,
    programs,
    segments,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of every ``programs``-th row of a group; their share of the sums.

    The two means of a row come from ``slopes``, or, where a row is two segments, from
    a look at the other one, which its own program has just brought into the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    segment = program % segments
    column = segment * BLOCK + tl.arange(0, BLOCK)
    present = column < columns
    program = program // segments
    row = program // programs * rows + program % programs
    end = (program // programs + 1) * rows
    scale_sums = tl.zeros((BLOCK,), WIDE)
    bias_sums = tl.zeros((BLOCK,), WIDE)
    while row < end:
        start = row * columns
        rstd = tl.load(rstd_ptr + row)
        mean = _statistic(mean_ptr, row)
        if slope_ptr is None:
            other = (1 - segment) * BLOCK + tl.arange(0, BLOCK)
            _, x, g = _segment(
                grad_ptr + start,
                x_ptr + start,
                mean,
                scale_ptr,
                other,
                other < columns,
                WIDE,
            )
            slope = tl.sum(g * x, 0)
            shift = tl.sum(g, 0)
        grad, x, g = _segment(
            grad_ptr + start, x_ptr + start, mean, scale_ptr, column, present, WIDE
        )
        scale_sums += grad * (x * rstd)
        bias_sums += grad
        if slope_ptr is None:
            slope = (slope + tl.sum(g * x, 0)) * rstd * rstd / columns
            shift = (shift + tl.sum(g, 0)) / columns
        else:
            slope = tl.load(slope_ptr + row) * rstd
            shift = _statistic(shift_ptr, row)
        x_grad = g - x * slope
        if mean_ptr is not None:
            x_grad -= shift
        x_grad *= rstd
        if total_grad_ptr is not None:
            x_grad += stream(total_grad_ptr + start, column, present, WIDE)
        tl.store(
            x_grad_ptr + start + column, x_grad.to(x_grad_ptr.dtype.element_ty), present
        )
        row += programs
    at = program * columns + column
    _share(scale_sums_ptr, at, scale_sums, present)
    _share(bias_sums_ptr, at, bias_sums, present)


@triton.jit
def _added(sums_ptr, out_ptr, group, column, programs, columns, ROWS: tl.constexpr):
    """One gradient of a group: its partial sums, added in the order of programs."""
    row = tl.arange(0, ROWS)[:, None]
    total = tl.load(
        sums_ptr + (group * programs + row) * columns + column,
        (row < programs) & (column < columns),
        0.0,
    )
    done = ROWS
    while done < programs:
        total += tl.load(
            sums_ptr + (group * programs + done + row) * columns + column,
            (done + row < programs) & (column < columns),
            0.0,
        )
        done += ROWS
    total = tl.sum(total, 0, keep_dims=True)
    if out_ptr.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + group * columns + column, total, column < columns)


@triton.jit(do_not_specialize=["programs"])
def add_up(
    scale_sums_ptr,
    bias_sums_ptr,
    scale_grad_ptr,
    bias_grad_ptr,
    programs,
    columns,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of scale and bias from the partial sums, BLOCK columns each."""
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    group = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    if scale_sums_ptr is not None:
        _added(scale_sums_ptr, scale_grad_ptr, group, column, programs, columns, ROWS)
    if bias_sums_ptr is not None:
        _added(bias_sums_ptr, bias_grad_ptr, group, column, programs, columns, ROWS)
