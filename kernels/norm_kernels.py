# SPDX-License-Identifier: Apache-2.0
r"""The kernels of RMSNorm and LayerNorm: rows divided by their root mean square.

With :math:`c = x - \mathrm{mean}(x)` (LayerNorm) or :math:`c = x` (RMSNorm), and
:math:`g = \bar y \, s`:

.. math::
  \hat x = r \, c, \quad r = (\mathrm{mean}(c^2) + \epsilon)^{-1/2}, \qquad
  \bar x = r \, (g - [\mathrm{mean}(g)] - \hat x \, \mathrm{mean}(g \hat x))

What is not there is None: scale, bias, residual, and the mean of an RMSNorm.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward_rows(
    x_ptr,
    residual_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows per program, in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    present = column < columns
    inside = (row < rows) & present
    at = row * columns + column
    x = tl.load(x_ptr + at, inside, 0.0, eviction_policy="evict_first").to(WIDE)
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + at, inside, 0.0, eviction_policy="evict_first"
        ).to(WIDE)
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, inside)
        x = total.to(WIDE)
    if mean_ptr is not None:
        mean = tl.sum(x, 1, keep_dims=True) / columns
        tl.store(mean_ptr + row, mean, row < rows)
        x = tl.where(present, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + EPS)
    tl.store(rstd_ptr + row, rstd, row < rows)
    y = x * rstd
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + column, present, 0.0, eviction_policy="evict_last").to(
            WIDE
        )
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, present, 0.0, eviction_policy="evict_last").to(
            WIDE
        )
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


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
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every ``programs``-th tile of a group of rows; its share of the sums."""
    program = tl.program_id(0).to(tl.int64)
    first = program // programs * rows
    tile = program % programs
    column = tl.arange(0, BLOCK)[None, :]
    present = column < columns
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, present, 0.0).to(WIDE)
    scale_sums = tl.zeros((ROWS, BLOCK), WIDE)
    bias_sums = tl.zeros((ROWS, BLOCK), WIDE)
    while tile * ROWS < rows:
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        there = row < rows
        inside = there & present
        row += first
        at = row * columns + column
        grad = tl.load(grad_ptr + at, inside, 0.0).to(WIDE)
        x = tl.load(x_ptr + at, inside, 0.0).to(WIDE)
        rstd = tl.load(rstd_ptr + row, there, 0.0)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row, there, 0.0)
        x *= rstd
        if scale_sums_ptr is not None:
            scale_sums += grad * x
        if bias_sums_ptr is not None:
            bias_sums += grad
        if scale_ptr is not None:
            grad *= scale
        slope = tl.sum(grad * x, 1, keep_dims=True) / columns
        x_grad = grad - x * slope
        if mean_ptr is not None:
            x_grad -= tl.sum(grad, 1, keep_dims=True) / columns
        x_grad *= rstd
        if total_grad_ptr is not None:
            x_grad += tl.load(total_grad_ptr + at, inside, 0.0).to(WIDE)
        tl.store(x_grad_ptr + at, x_grad.to(x_grad_ptr.dtype.element_ty), inside)
        tile += programs
    at = program * columns + tl.arange(0, BLOCK)
    within = tl.arange(0, BLOCK) < columns
    if scale_sums_ptr is not None:
        tl.store(scale_sums_ptr + at, tl.sum(scale_sums, 0), within)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + at, tl.sum(bias_sums, 0), within)


@triton.jit
def forward_chunks(
    x_ptr,
    residual_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    columns,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program, in chunks: its statistics, then the row again."""
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    mean = tl.sum(tl.zeros((BLOCK,), WIDE), 0)
    squares = mean
    done = 0
    while done < columns:
        column = done + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(x_ptr + start + column, inside, 0.0).to(WIDE)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + start + column, inside, 0.0).to(WIDE)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + start + column, total, inside)
            x = total.to(WIDE)
        if mean_ptr is not None:
            # Chan's update: the squares around the mean of the chunk, then its shift.
            count = tl.minimum(columns - done, BLOCK).to(WIDE)
            here = tl.sum(x, 0) / count
            x = tl.where(inside, x - here, 0.0)
            shift = here - mean
            mean += shift * (count / (done + count))
            squares += shift * shift * (count * (done / (done + count)))
        squares += tl.sum(x * x, 0)
        done += BLOCK
    rstd = tl.rsqrt(squares / columns + EPS)
    tl.store(rstd_ptr + row, rstd)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    done = 0
    while done < columns:
        column = done + tl.arange(0, BLOCK)
        inside = column < columns
        if residual_ptr is not None:
            y = tl.load(total_ptr + start + column, inside, 0.0).to(WIDE)
        else:
            y = tl.load(x_ptr + start + column, inside, 0.0).to(WIDE)
        if mean_ptr is not None:
            y -= mean
        y *= rstd
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + column, inside, 0.0).to(WIDE)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, inside, 0.0).to(WIDE)
        tl.store(y_ptr + start + column, y.to(y_ptr.dtype.element_ty), inside)
        done += BLOCK


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
        grad = tl.load(grad_ptr + start + column, inside, 0.0).to(WIDE)
        x = tl.load(x_ptr + start + column, inside, 0.0).to(WIDE)
        if mean_ptr is not None:
            x -= mean
        if scale_ptr is not None:
            grad *= tl.load(scale_ptr + column, inside, 0.0).to(WIDE)
        slopes += grad * (x * rstd)
        shifts += grad
        done += BLOCK
    tl.store(slope_ptr + row, tl.sum(slopes, 0) / columns)
    if mean_ptr is not None:
        tl.store(shift_ptr + row, tl.sum(shifts, 0) / columns)


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
    """BLOCK columns of every ``programs``-th row of a group, given the two means."""
    program = tl.program_id(0).to(tl.int64)
    column = program % segments * BLOCK + tl.arange(0, BLOCK)
    present = column < columns
    program = program // segments
    row = program // programs * rows + program % programs
    end = (program // programs + 1) * rows
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + column, present, 0.0).to(WIDE)
    scale_sums = tl.zeros((BLOCK,), WIDE)
    bias_sums = tl.zeros((BLOCK,), WIDE)
    while row < end:
        at = row * columns + column
        grad = tl.load(grad_ptr + at, present, 0.0).to(WIDE)
        x = tl.load(x_ptr + at, present, 0.0).to(WIDE)
        rstd = tl.load(rstd_ptr + row)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row)
        x *= rstd
        if scale_sums_ptr is not None:
            scale_sums += grad * x
        if bias_sums_ptr is not None:
            bias_sums += grad
        if scale_ptr is not None:
            grad *= scale
        x_grad = grad - x * tl.load(slope_ptr + row)
        if mean_ptr is not None:
            x_grad -= tl.load(shift_ptr + row)
        x_grad *= rstd
        if total_grad_ptr is not None:
            x_grad += tl.load(total_grad_ptr + at, present, 0.0).to(WIDE)
        tl.store(x_grad_ptr + at, x_grad.to(x_grad_ptr.dtype.element_ty), present)
        row += programs
    if scale_sums_ptr is not None:
        tl.store(scale_sums_ptr + program * columns + column, scale_sums, present)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + program * columns + column, bias_sums, present)


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
