# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of cross-entropy: one program per row, in blocks of columns.

Columns are those of one shard of the vocabulary, ``first`` and on. A label that is
neither in the vocabulary nor ``IGNORE`` makes NaN of its row and is never an address.
The second sweep of a row goes backwards: what the first read last is still in L2.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x, WIDE: tl.constexpr):
    # Without the cancellation of 1 - exp near 0, where float32 takes a series.
    small = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - small) / (1.0 + small)
    y = tl.where(x < 0, -y, y)
    if tl.float32 == WIDE:
        z = x * x
        series = z * (2.0 / 15.0 + z * (-17.0 / 315.0 + z * (62.0 / 2835.0)))
        y = tl.where(z < 0.04, x + x * z * (-1.0 / 3.0 + series), y)
    return y


@triton.jit
def _capped(x, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    if SOFTCAP is not None:
        x = SOFTCAP * _tanh(x / SOFTCAP, WIDE)
    return x


@triton.jit
def _sweep(
    row_ptr,
    cols,
    end,
    SOFTCAP: tl.constexpr,
    TOTAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    top = tl.full((), -float("inf"), WIDE)
    weight = tl.full((), 0.0, WIDE)
    total = tl.full((), 0.0, WIDE)
    start = 0
    while start < end:
        column = start + tl.arange(0, BLOCK)
        inside = column < cols
        x = _capped(tl.load(row_ptr + column, inside, 0.0).to(WIDE), SOFTCAP, WIDE)
        if TOTAL:
            total += tl.sum(tl.where(inside, x, 0.0), 0)
        x = tl.where(inside, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        weight = weight * tl.exp(top - finite) + tl.sum(tl.exp(x - finite), 0)
        top = higher
        start += BLOCK
    return top, weight, total


@triton.jit
def _label_logit(row_ptr, label, cols, SOFTCAP: tl.constexpr, WIDE: tl.constexpr):
    x = tl.load(row_ptr + label, (label >= 0) & (label < cols), 0.0).to(WIDE)
    return _capped(x, SOFTCAP, WIDE)


@triton.jit
def _slopes(
    row_ptr,
    out_ptr,
    cols,
    size,
    label,
    cotangent,
    logsumexp,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = 1.0 + 2.0 * Z_LOSS * logsumexp
    start = (cols - 1) // BLOCK * BLOCK
    while start >= 0:
        column = start + tl.arange(0, BLOCK)
        inside = column < cols
        x = tl.load(row_ptr + column, inside, 0.0).to(WIDE)
        capped = _capped(x, SOFTCAP, WIDE)
        slope = tl.exp(capped - logsumexp)
        if Z_LOSS != 0.0:
            slope = slope * factor
        if SMOOTHING != 0.0:
            slope = slope - tl.full((), SMOOTHING, WIDE) / size
        slope = tl.where(column == label, slope - (1.0 - SMOOTHING), slope) * cotangent
        if SOFTCAP is not None:
            tanh = capped / SOFTCAP
            slope = slope * (1.0 - tanh * tanh)
        tl.store(out_ptr + column, slope.to(out_ptr.dtype.element_ty), inside)
        start -= BLOCK


@triton.jit
def _zeros(out_ptr, cols, BLOCK: tl.constexpr):
    zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    start = 0
    while start < cols:
        column = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + column, zeros, column < cols)
        start += BLOCK


@triton.jit
def loss_kernel(
    logits_ptr,
    targets_ptr,
    cotangents_ptr,
    losses_ptr,
    logsumexps_ptr,
    slopes_ptr,
    cols,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of a row, and with SLOPES its gradient, also in place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * cols
    label = tl.load(targets_ptr + row).to(tl.int64)
    live = label != IGNORE
    at_label = _label_logit(row_ptr, tl.where(live, label, -1), cols, SOFTCAP, WIDE)
    end = tl.where(live, cols, 0)
    top, weight, total = _sweep(
        row_ptr, cols, end, SOFTCAP, SMOOTHING != 0.0, WIDE, BLOCK
    )
    top = tl.where(live, top, 0.0)
    logarithm = tl.log(tl.where(weight == 0.0, 1.0, weight))
    logsumexp = top + logarithm
    loss = logarithm + (1.0 - SMOOTHING) * (top - at_label)
    if SMOOTHING != 0.0:
        loss += SMOOTHING * (top - total / cols)
    if Z_LOSS != 0.0:
        loss += Z_LOSS * logsumexp * logsumexp
    known = (label >= 0) & (label < cols)
    loss = tl.where(live, tl.where(known, loss, float("nan")), 0.0)
    logsumexp = tl.where(live, tl.where(known, logsumexp, float("nan")), 0.0)
    tl.store(losses_ptr + row, loss)
    if SLOPES:
        if live:
            _slopes(
                row_ptr,
                slopes_ptr + row * cols,
                cols,
                cols,
                label,
                tl.load(cotangents_ptr + row).to(WIDE),
                logsumexp,
                SMOOTHING,
                Z_LOSS,
                SOFTCAP,
                WIDE,
                BLOCK,
            )
        else:
            _zeros(slopes_ptr + row * cols, cols, BLOCK)
    else:
        tl.store(logsumexps_ptr + row, logsumexp)


@triton.jit
def slopes_kernel(
    logits_ptr,
    targets_ptr,
    cotangents_ptr,
    logsumexps_ptr,
    slopes_ptr,
    cols,
    first,
    size,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    IGNORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a row of a shard, from the logsumexp of the whole row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(targets_ptr + row).to(tl.int64)
    known = (label >= 0) & (label < size)
    logsumexp = tl.load(logsumexps_ptr + row).to(WIDE)
    if label != IGNORE:
        _slopes(
            logits_ptr + row * cols,
            slopes_ptr + row * cols,
            cols,
            size,
            label - first,
            tl.load(cotangents_ptr + row).to(WIDE),
            tl.where(known, logsumexp, float("nan")),
            SMOOTHING,
            Z_LOSS,
            SOFTCAP,
            WIDE,
            BLOCK,
        )
    else:
        _zeros(slopes_ptr + row * cols, cols, BLOCK)


@triton.jit
def statistics_kernel(
    logits_ptr,
    targets_ptr,
    tops_ptr,
    weights_ptr,
    at_labels_ptr,
    totals_ptr,
    cols,
    first,
    IGNORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a shard of a row gives to its loss."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * cols
    label = tl.load(targets_ptr + row).to(tl.int64)
    live = label != IGNORE
    label = tl.where(live, label - first, -1)
    at_label = _label_logit(row_ptr, label, cols, SOFTCAP, WIDE)
    end = tl.where(live, cols, 0)
    top, weight, total = _sweep(row_ptr, cols, end, SOFTCAP, True, WIDE, BLOCK)
    tl.store(tops_ptr + row, top)
    tl.store(weights_ptr + row, weight)
    tl.store(at_labels_ptr + row, at_label)
    tl.store(totals_ptr + row, total)
