# SPDX-License-Identifier: Apache-2.0
r"""A residual plus the dropout of a sum with a bias, in one pass.

.. math::
  y = r + m \, \frac{x + b}{1 - p}, \qquad
  \bar x = m \, \frac{\bar y}{1 - p}, \qquad
  \bar b = \sum_\mathrm{rows} \bar x, \qquad \bar r = \bar y

The mask m is no input and is not stored: it is a hash of a key and of the place of an
element among those of its key (``counter_random``), computed again in the backward. So
it depends on the key alone, not on blocks, devices or the mesh.

Bytes per element, in elements of the dtype: forward 2 read and 1 written (6 B in
bfloat16), backward 1 read and 1 written (4 B); the gradient of the residual is the one
that comes in.
"""

import dataclasses
import struct
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import (
    Tiles,
    check_bias,
    configurations,
    finish,
    grouped,
    launch,
    merged,
    place,
    split,
)
from .counter_random import is_kept, keep_mask, threshold
from .gated import dense_like
from .library import (
    FirstOrder,
    Kernel,
    check_floating,
    check_number,
    check_shape,
    compute_dtype,
    define,
    pullback,
    runs_triton,
)

NAME: Final = "bias_dropout_residual"
BACKWARD_REGISTERS: Final = 104  # ptxas alone may take 96, and spill


def bias_dropout_residual_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor, key: Tensor | None, rate: float
) -> Tensor:
    """``residual + dropout(x + bias)`` in float32 at least, rounded once.

    Args:
      x: Any shape and floating dtype.
      bias: ``[D]``, or None.
      residual: Like ``x``.
      key: int64, of the leading dims of ``x``; None without a rate.
      rate: The share of zeros.
    """
    dtype = compute_dtype(x.dtype)
    hidden = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    if key is not None and rate > 0.0:
        kept = keep_mask(key, x.shape[key.dim() :], rate)
        # By a tensor: on CUDA torch multiplies by the reciprocal of a number.
        share = hidden.new_full((), 1.0 - rate)
        hidden = torch.where(kept, hidden / share, hidden.new_zeros(()))
    return (residual.to(dtype) + hidden).to(x.dtype)


@triton.jit
def divided(a, b):
    """``a / b`` as IEEE rounds it: `/` alone is approximate in float32."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _dropped(
    hidden, group, row, col, shape, dropout, KEYS: tl.constexpr, INDEX: tl.constexpr
):
    """Dropout of a tile; KEYS says how the keys of a group lie over its elements.

    The share that is kept comes as the bits of a float64: arguments that are floats
    are float32. INDEX is int32 where that counts the rows: division is slow in int64.
    """
    rows, columns = shape
    keys_ptr, num_keys, threshold, kept_bits = dropout
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    counter = row[:, None] * columns + col[None, :]
    keys_ptr += group * num_keys
    if KEYS == "one":
        key = tl.load(keys_ptr)
    elif KEYS == "rows":
        each = rows // num_keys
        of = (row.to(INDEX) // each).to(tl.int64)
        key = tl.load(keys_ptr + of, row < rows, 0)[:, None]
        counter -= (of * each)[:, None] * columns
    else:
        key = tl.load(keys_ptr + counter, inside, 0)
        counter = counter * 0
    kept = is_kept(key, counter, threshold)
    share = kept_bits.to(tl.float64, bitcast=True).to(hidden.dtype)
    return tl.where(kept, divided(hidden, share), 0.0)


@triton.jit(do_not_specialize=["threshold", "kept_bits"])
def _forward_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    keys_ptr,
    out_ptr,
    rows,
    columns,
    span,
    num_keys,
    threshold,
    kept_bits,
    KEYS: tl.constexpr,
    INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, _, begin, end, col = place(rows, columns, span, COLS)
    row = begin + tl.arange(0, ROWS)
    inside = (row < end)[:, None] & (col < columns)[None, :]
    at = (group * rows + row)[:, None] * columns + col[None, :]
    hidden = tl.load(x_ptr + at, inside, 0.0).to(WIDE)
    residual = tl.load(residual_ptr + at, inside, 0.0).to(WIDE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + group * columns + col, col < columns, 0.0)
        hidden += bias.to(WIDE)[None, :]
    if KEYS != "none":
        dropout = keys_ptr, num_keys, threshold, kept_bits
        hidden = _dropped(
            hidden, group, row, col, (rows, columns), dropout, KEYS, INDEX
        )
    out = residual + hidden
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["threshold", "kept_bits"])
def _backward_kernel(
    grad_ptr,
    keys_ptr,
    x_grad_ptr,
    partial_ptr,
    rows,
    columns,
    span,
    num_keys,
    threshold,
    kept_bits,
    KEYS: tl.constexpr,
    INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, part, begin, end, col = place(rows, columns, span, COLS)
    dropout = keys_ptr, num_keys, threshold, kept_bits
    total = tl.zeros([ROWS, COLS], WIDE)
    while begin < end:
        row = begin + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (col < columns)[None, :]
        at = (group * rows + row)[:, None] * columns + col[None, :]
        grad = tl.load(grad_ptr + at, inside, 0.0).to(WIDE)
        x_grad = _dropped(grad, group, row, col, (rows, columns), dropout, KEYS, INDEX)
        tl.store(x_grad_ptr + at, x_grad.to(x_grad_ptr.dtype.element_ty), inside)
        if partial_ptr is not None:
            total += x_grad
        begin += ROWS
    if partial_ptr is not None:
        tl.store(partial_ptr + part * columns + col, tl.sum(total, 0), col < columns)


def _dropout(x: Tensor, keys: Tensor | None, rate: float) -> dict[str, Any]:
    """The arguments of the kernels for the keys [groups, keys] of x."""
    num_keys = 1 if keys is None else keys.shape[1]
    if keys is None:
        how = "none"
    elif num_keys == 1:
        how = "one"
    else:
        how = "rows" if x.shape[1] % num_keys == 0 else "elements"
    return {
        "num_keys": num_keys,
        "threshold": threshold(rate),
        "kept_bits": struct.unpack("q", struct.pack("d", 1.0 - rate))[0],
        "KEYS": how,
        "INDEX": tl.int32 if x.shape[1] < 2**31 else tl.int64,
    }


def _forward(
    x: Tensor, bias: Tensor | None, residual: Tensor, keys: Tensor | None, rate: float
) -> Tensor:
    out = dense_like(x)
    if out.numel() > 0:
        tiles = Tiles.of(*x.shape)
        inputs, dropout = (x, bias, residual, keys), _dropout(x, keys, rate)
        launch(_forward_kernel, inputs, (out,), tiles, tiles.rows, **dropout)
    return out


def _backward(
    grad: Tensor, keys: Tensor, rate: float, bias: bool
) -> tuple[Tensor, Tensor]:
    x_grad = dense_like(grad)
    tiles = Tiles.of(*grad.shape)
    partial = tiles.partial(grad) if bias else None
    if grad.numel() > 0:
        outputs, dropout = (x_grad, partial), _dropout(grad, keys, rate)
        dropout["maxnreg"] = BACKWARD_REGISTERS
        launch(_backward_kernel, (grad, keys), outputs, tiles, tiles.span, **dropout)
    if grad.numel() > 0 and partial is not None:
        return x_grad, finish(partial, grad.dtype)
    return x_grad, _bias_grad(grad, bias).zero_()


def _bias_grad(grad: Tensor, bias: bool) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[2] if bias else 0))


forward_op: Final = define(
    "bias_dropout_residual_forward(Tensor x, Tensor? bias, Tensor residual,"
    " Tensor? keys, float rate) -> Tensor",
    _forward,
    fake=lambda x, *_: dense_like(x),
    vmap=lambda info, dims, *xs: (
        split(info, forward_op(*merged(info, dims, xs))),
        0,
    ),
)
backward_op: Final = define(
    "bias_dropout_residual_backward(Tensor grad, Tensor keys, float rate, bool bias)"
    " -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, keys, rate, bias: (dense_like(grad), _bias_grad(grad, bias)),
    vmap=lambda info, dims, *xs: (
        tuple(split(info, y) for y in backward_op(*merged(info, dims, xs))),
        (0, 0),
    ),
)
_transposed: Final = pullback(backward_op)


class _BiasDropoutResidual(FirstOrder):
    """The two operators as a function and its transpose; it keeps the keys alone."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        keys: Tensor | None,
        rate: float,
    ) -> Tensor:
        return forward_op(x, bias, residual, keys, rate)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, bias, _, keys, ctx.rate = inputs
        ctx.bias = bias is not None
        ctx.save_for_backward(keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (keys,) = ctx.saved_tensors
        if keys is not None:
            x_grad, bias_grad = _transposed(grad, keys, ctx.rate, ctx.bias)
        else:
            x_grad, wide = grad, compute_dtype(grad.dtype)
            bias_grad = grad.sum(1, dtype=wide).to(grad.dtype) if ctx.bias else None
        return x_grad, bias_grad if ctx.bias else None, grad, None, None


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    key: Tensor | None,
    rate: float,
    *,
    kernel: Kernel = "auto",
) -> Tensor:
    r"""A residual plus a dropout, :math:`r + m (x + b) / (1 - p)`.

    Args:
      x: ``[..., D]``, floating; computed in float32 (float64 for float64).
      bias: ``[D]``, of the dtype and device of ``x``; or None.
      residual: Like ``x``: its shape, dtype and device.
      key: int64, 0-d or with the leading dims of ``x``, one key per sample; it may be
        None where ``rate`` is 0.
      rate: The share p of elements of ``x + b`` that become zero, in [0, 1).
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``x``, rounded once; contiguous from Triton.

    Raises:
      TypeError: An argument that is not a floating tensor, two dtypes, or a key that
        is not int64.
      ValueError: Shapes that do not fit; two devices; a ``rate`` outside [0, 1), or one
        without a key; a ``kernel`` that is not there.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      The mask is that of ``zfunc.core.random.dropout`` bit for bit. In float32
      ``kernel="triton"`` is ``kernel="reference"`` bit for bit too.

    Examples:
      >>> x, residual = torch.ones(1, 8), torch.zeros(1, 8)
      >>> bias_dropout_residual(x, None, residual, torch.tensor(1), 0.5)
      tensor([[0., 0., 0., 0., 0., 0., 2., 2.]])

    Differs from:
      A dropout of torch draws from a generator, whose state says which mask it was.
    """
    check_floating(NAME, x=x, bias=bias, residual=residual)
    check_shape(NAME, "residual", residual, tuple(x.shape))
    if residual.dtype != x.dtype:
        raise TypeError(
            f"{NAME}: residual is {residual.dtype}, expected {x.dtype} as x; use "
            "residual.to(x.dtype)"
        )
    if bias is not None:
        check_bias(NAME, x, bias)
    _check_key(x, key, rate)
    key = key if rate > 0.0 else None
    if not runs_triton(NAME, kernel, x, bias, residual, key):
        return bias_dropout_residual_reference(x, bias, residual, key, rate)
    bias = None if bias is None else bias[None]
    keys = None if key is None else key.reshape(1, key.numel())
    out = _BiasDropoutResidual.apply(grouped(x), bias, grouped(residual), keys, rate)
    return out.reshape(x.shape)


def _check_key(x: Tensor, key: Tensor | None, rate: float) -> None:
    check_number(NAME, "rate", rate)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{NAME}: rate is {rate}, expected one in [0, 1); type 0.1")
    if key is None and rate > 0.0:
        raise ValueError(
            f"{NAME}: key is None and rate {rate}, expected an int64 tensor; type "
            "torch.tensor(0)"
        )
    if key is None:
        return
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        got = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(
            f"{NAME}: key is {got}, expected an int64 tensor; use torch.tensor(0)"
        )
    if key.shape != x.shape[: key.dim()]:
        raise ValueError(
            f"{NAME}: key has shape {tuple(key.shape)}, expected how "
            f"{tuple(x.shape)}, the shape of x, begins; give one key per sample"
        )


_KERNELS: Final = (
    (
        "forward",
        _forward_kernel,
        ("x_ptr", "bias_ptr", "residual_ptr", "out_ptr"),
        (),
        3,
    ),
    ("backward", _backward_kernel, ("grad_ptr", "x_grad_ptr"), ("partial_ptr",), 3),
)
CONFIGURATIONS: Final = tuple(
    dataclasses.replace(
        one, max_registers=BACKWARD_REGISTERS if kind == "backward" else None
    )
    for keys in ("one", "rows")
    for kind, kernel, pointers, sums, narrow in _KERNELS
    for one in configurations(
        f"{NAME}/{kind}/{keys}",
        kernel,
        pointers,
        {"KEYS": keys, "INDEX": tl.int32},
        narrow,
        dict.fromkeys(sums, "*fp32")
        | {"keys_ptr": "*i64", "kept_bits": "i64"}
        | {"num_keys": "i32", "threshold": "i32"},
    )
)
